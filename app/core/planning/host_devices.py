"""The devices of this host, by their names and as the driver's own program lists them. Without torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

DEVICE = re.compile(r"auto|cpu|cuda:\d{1,2}")


VISIBLE = "CUDA_VISIBLE_DEVICES"


class Gpu(NamedTuple):
    """A GPU as the driver's program lists it. `cuda:N` is the N-th of those that this process may see."""

    uuid: str
    name: str


def gpu_names() -> list[str]:
    """The names of the GPUs that this process may see, in the order of their numbers."""
    return [gpu.name for gpu in visible_gpus()]


def visible_gpus() -> list[Gpu]:
    """In CUDA's order, on a host whose GPUs are alike or with CUDA_DEVICE_ORDER=PCI_BUS_ID.

    The driver's program knows nothing of CUDA_VISIBLE_DEVICES, which hides and reorders them for CUDA.
    """
    everything = listed_gpus()
    named = os.environ.get(VISIBLE)
    if named is None:
        return everything
    seen: list[Gpu] = []
    for entry in named.split(","):
        gpu = gpu_of(entry.strip(), everything)
        if gpu is None or gpu in seen:  # CUDA sees none after an entry that it can't use
            break
        seen.append(gpu)
    return seen


def driver_name(number: int) -> str:
    """What the driver's program calls `cuda:number`: without CUDA_VISIBLE_DEVICES the same number."""
    entries = os.environ.get(VISIBLE, "").split(",")
    return entries[number].strip() if VISIBLE in os.environ and number < len(entries) else str(number)


def has_gpu() -> bool:
    """Whether this process may see a GPU, also on a host without the driver's program."""
    hidden = os.environ.get(VISIBLE, "0").strip() in ("", "-1")
    return bool(gpu_names()) or (Path("/dev/nvidia0").exists() and not hidden)


def gpu_of(entry: str, everything: list[Gpu]) -> Gpu | None:
    """The GPU of a number or of the beginning of a UUID."""
    if entry.isdecimal():
        return everything[int(entry)] if int(entry) < len(everything) else None
    return next((gpu for gpu in everything if entry and gpu.uuid.startswith(entry)), None)


def listed_gpus() -> list[Gpu]:
    """All GPUs of the host, in the order of the driver's program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=uuid,name", "--format=csv,noheader"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True)
    except (OSError, subprocess.SubprocessError):
        return []  # the tool without its driver, as in images built for GPUs and run without one
    rows = (line.partition(",") for line in listing.stdout.splitlines() if line.strip())
    return [Gpu(uuid.strip(), name.strip()) for uuid, _, name in rows]
