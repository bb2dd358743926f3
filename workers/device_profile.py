"""Measures the device that it runs on: `python -m workers.device_profile --device cpu --folder DIR`.

A process of its own, because a worker never imports torch. It prints one JSON line and takes seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from app.core.device_profile import DeviceProfile

SIZES = (256, 512, 1024, 2048)
CUDA_SIZES = (*SIZES, 4096)
ROUND_S = 0.12  # repeat until this much time has passed
ARRAY_VALUES = 1 << 24
DISK_BYTES = 1 << 26


def rate(work: float, step: Callable[[], object], device: torch.device) -> float:
    """Units of `work` per second in the best run of `step`: others may share the host."""
    step()
    wait_for(device)
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < ROUND_S:
        began = time.perf_counter()
        step()
        wait_for(device)
        best = min(best, time.perf_counter() - began)
    return work / best


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rates(device: torch.device, dtype: torch.dtype) -> dict[int, float]:
    rates = {}
    for size in CUDA_SIZES if device.type == "cuda" else SIZES:
        matrix = torch.randn(size, size, device=device, dtype=dtype)
        out = torch.empty_like(matrix)
        rates[size] = rate(2 * size**3, lambda a=matrix, b=out: torch.mm(a, a, out=b), device)  # type: ignore[misc]
    return rates


def disk_rate(folder: Path) -> float:
    content = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(DISK_BYTES // len(content)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return DISK_BYTES / (time.perf_counter() - started)


def measure(device: torch.device, folder: Path) -> DeviceProfile:
    values = torch.ones(ARRAY_VALUES, device=device)
    elementwise = rate(2 * 4 * ARRAY_VALUES, lambda: values.mul_(1.0), device)
    float32 = matmul_rates(device, torch.float32)
    cuda = device.type == "cuda"
    return DeviceProfile(
        device="cuda" if cuda else "cpu",
        matmul=matmul_rates(device, torch.bfloat16) if cuda else float32,
        matmul_float32=float32,
        elementwise=elementwise,
        disk=disk_rate(folder),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where jobs write")
    options = parser.parse_args()
    sys.stdout.write(measure(torch.device(options.device), options.folder).model_dump_json() + "\n")


if __name__ == "__main__":
    main()
