"""Memory in use on a worker's device, for its heartbeats: the GPU's, or the host's where there is none.

Of a GPU also how busy it is, while a job runs.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

from app.core.planning.host_devices import driver_name

MEMORY_TABLE = Path("/proc/meminfo")
SMI_LIMIT_S = 5
MIB = 1024**2  # of which nvidia-smi counts memory


class DeviceMemory(NamedTuple):
    used: int | None
    total: int | None


UNKNOWN = DeviceMemory(None, None)


def device_memory(device: str) -> DeviceMemory:
    kind, _, index = device.partition(":")
    return gpu_memory(index) if kind == "cuda" else host_memory()


def gpu_memory(index: str) -> DeviceMemory:
    """As nvidia-smi reports it."""
    figures = gpu_figures(int(index), "memory.used", "memory.total")
    return DeviceMemory(figures[0] * MIB, figures[1] * MIB) if figures else UNKNOWN


def gpu_use(index: int) -> tuple[int, float] | None:
    """Bytes in use by all processes, and the share of the last second that it was busy; None: not known."""
    figures = gpu_figures(index, "memory.used", "utilization.gpu")
    return (figures[0] * MIB, figures[1] / 100) if figures else None


def gpu_figures(index: int, *names: str) -> list[int]:
    """Figures of nvidia-smi in its own units; empty where it has none."""
    fields = f"--query-gpu={','.join(names)}"
    command = ["nvidia-smi", fields, "--format=csv,noheader,nounits", "-i", driver_name(index)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_LIMIT_S, check=True)
        numbers = [int(number) for number in answer.stdout.split(",")]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    return numbers if len(numbers) == len(names) else []


def host_memory() -> DeviceMemory:
    try:
        lines = MEMORY_TABLE.read_text("utf-8").splitlines()
        sizes = {
            name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)
        }
        return DeviceMemory(sizes["MemTotal"] - sizes["MemAvailable"], sizes["MemTotal"])
    except (OSError, KeyError, ValueError, IndexError):
        return UNKNOWN
