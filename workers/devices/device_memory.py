"""Memory in use on a worker's device, for its heartbeats: the GPU's, or the host's where there is none."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

from app.core.planning.host_devices import driver_name

MEMORY_TABLE = Path("/proc/meminfo")
SMI_LIMIT_S = 5


class DeviceMemory(NamedTuple):
    used: int | None
    total: int | None


UNKNOWN = DeviceMemory(None, None)


def device_memory(device: str) -> DeviceMemory:
    kind, _, index = device.partition(":")
    return gpu_memory(index) if kind == "cuda" else host_memory()


def gpu_memory(index: str) -> DeviceMemory:
    """As nvidia-smi reports it."""
    fields = "--query-gpu=memory.used,memory.total"
    command = ["nvidia-smi", fields, "--format=csv,noheader,nounits", "-i", driver_name(int(index))]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_LIMIT_S, check=True)
        used, total = (int(number) * 1024**2 for number in answer.stdout.split(","))
    except (OSError, ValueError, subprocess.SubprocessError):
        return UNKNOWN
    return DeviceMemory(used, total)


def host_memory() -> DeviceMemory:
    try:
        lines = MEMORY_TABLE.read_text("utf-8").splitlines()
        sizes = {
            name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)
        }
        return DeviceMemory(sizes["MemTotal"] - sizes["MemAvailable"], sizes["MemTotal"])
    except (OSError, KeyError, ValueError, IndexError):
        return UNKNOWN
