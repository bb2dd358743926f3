"""The device's profile: measured once on a host, kept in the cache folder for all workers. Without torch."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from pydantic import ValidationError

from app.core.planning.device_profile import DeviceProfile

log = logging.getLogger(__name__)

LIMIT_S = 300.0  # seconds, unless the host is busy


def kept_profile(device: str, device_name: str, folder: Path) -> DeviceProfile | None:
    """How fast the device is, and the disk below `folder`: as measured before, or now; None if that fails."""
    path = profiles_folder(folder) / f"{device.replace(':', '')}-{circumstances(device_name, folder)}.json"
    with contextlib.suppress(OSError, ValidationError):
        return DeviceProfile.model_validate_json(path.read_text("utf-8"))
    log.info("measuring %s once; kept in %s", device, path)
    command = [
        sys.executable,
        "-m",
        "workers.devices.profile_measurement",
        "--device",
        device,
        "--folder",
        str(folder),
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
        profile = DeviceProfile.model_validate_json(answer.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, IndexError, ValidationError) as fault:
        log.warning("%s could not be measured; estimates use nominal rates: %s", device, fault)
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(profile.model_dump_json() + "\n", "utf-8")
        os.replace(aside, path)
    except OSError as fault:
        log.warning("the profile of %s can't be kept in %s: %s", device, path.parent, fault)
    return profile


def profiles_folder(homeless: Path) -> Path:
    """In the user's cache, or below `homeless` for a user without a home, as containers have them."""
    try:
        return Path.home() / ".cache" / "nibble" / "profiles"
    except RuntimeError:
        return homeless / "profiles"


def circumstances(device_name: str, folder: Path) -> str:
    """A short digest of the host, device, threads, disk and versions that rates depend on."""
    facts = (
        socket.gethostname(), device_name, os.environ.get("OMP_NUM_THREADS", ""), str(folder.stat().st_dev),
        version("nibble"), version("torch"),
    )  # fmt: skip
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
