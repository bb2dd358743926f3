"""The devices of this host, by their names and as the driver's own program lists them. Without torch."""

from __future__ import annotations

import re
import shutil
import subprocess

DEVICE = re.compile(r"auto|cpu|cuda:\d{1,2}")


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
