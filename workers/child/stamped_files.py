"""Safetensors files that carry the identity of the work that they belong to.

A file is complete when it has its name: it is written aside and renamed. One of other work, or one that
was cut short, is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from app.core.system_faults import system_number


def identity_digest(**parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def write_stamped(path: Path, tensors: dict[str, Tensor], identity: str, extra: str = "") -> None:
    aside = path.with_suffix(".partial")
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(contiguous, aside, metadata={"identity": identity, "extra": extra})
    os.replace(aside, path)


def is_stamped(path: Path, identity: str) -> bool:
    """True if the file exists, is whole and belongs to the work `identity`."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            return bool((file.metadata() or {}).get("identity") == identity)
    except SafetensorError as fault:
        if system_number(fault) is not None:  # the file may be whole
            raise
        return False


def read_stamped(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors and the `extra` text that were written."""
    with safe_open(path, "pt") as file:
        # Cloned: a tensor that maps the file would keep its pages resident.
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()["extra"]  # noqa: SIM118  # not a dict
