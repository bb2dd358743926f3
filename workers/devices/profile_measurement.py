"""`python -m workers.devices.profile_measurement --device cpu --folder DIR` measures the device it runs on.

A process of its own, because a worker never imports torch. It prints one JSON line and takes seconds.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch

from app.core.formats.file_format import Scheme
from app.core.planning.cost_model import FINALISTS, SAMPLED_ROWS, evaluations
from app.core.planning.device_profile import DeviceProfile, SearchStep
from app.core.records.specs import Recipe, SearchSpec
from workers.devices.selection import select_device
from workers.process import leave
from workers.quantization.input_statistics import InputStatistics
from workers.quantization.rounding import FoldedLinear, round_linear
from workers.quantization.scale_search import Fold, ScaledLinear, search_scales

SIZES = (256, 512, 1024, 2048)
CUDA_SIZES = (*SIZES, 4096)
WIDTHS, CUDA_WIDTHS = (256, 1024), (1024, 4096)  # of the linears that are searched
ROUND_S = 0.12  # repeat until this much time has passed
ARRAY_VALUES = 1 << 24
DISK_BYTES = 1 << 26


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """Of the best run of `step`. Others may share the host: a single thread counts only its own time."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    step()
    wait_for(device)
    best, started = math.inf, time.perf_counter()
    while time.perf_counter() - started < ROUND_S:
        began = clock()
        step()
        wait_for(device)
        best = min(best, clock() - began)
    return best


def rate(work: float, step: Callable[[], object], device: torch.device) -> float:
    """Units of `work` per second."""
    return work / seconds_of(step, device)


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


def search_seconds(device: torch.device) -> dict[SearchStep, dict[int, float]]:
    """Per weight, and for scales per candidate, by the number of in_features."""
    by_step: dict[SearchStep, dict[int, float]] = {step: {} for step in get_args(SearchStep)}
    for width in CUDA_WIDTHS if device.type == "cuda" else WIDTHS:
        for step, seconds in search_steps(width, device).items():
            by_step[step][width] = seconds
    return by_step


def search_steps(width: int, device: torch.device) -> dict[SearchStep, float]:
    """The engine's own steps on a random linear (rows, width): AWQ's settings for 4 bits by default."""
    generator = torch.Generator().manual_seed(0)
    rows, scheme = SAMPLED_ROWS, Scheme(bits=4, group_size=128, symmetric=False)
    weight = (torch.randn(rows, width, generator=generator) * width**-0.5).to(device)
    inputs = torch.randn(2 * width, width, generator=generator).to(device)
    moment = inputs.T @ inputs / len(inputs)
    statistics = InputStatistics(inputs.abs().mean(dim=0), moment, len(inputs))
    linears, search = [ScaledLinear(weight, scheme)], SearchSpec()
    fold = Fold(torch.ones(width, device=device), True, None, torch.float16)
    tried = (evaluations(Recipe()) * SAMPLED_ROWS + FINALISTS * rows) * width

    def rounded(recipe: Recipe) -> float:
        linear = FoldedLinear("", weight, moment, scheme, weight)
        seconds = seconds_of(lambda: round_linear(linear, recipe, torch.float16), device)
        return seconds / rows / width

    nearest = rounded(Recipe(method="rtn"))
    clipped = rounded(Recipe())
    return {
        "scales": seconds_of(lambda: search_scales(linears, statistics, fold, search), device) / tried,
        "nearest": nearest,
        "clip": max(0.0, clipped - nearest),
        "gptq": max(0.0, rounded(Recipe(method="gptq")) - clipped),  # on all grids that follow a clip search
    }


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
        search=search_seconds(device),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where jobs write")
    options = parser.parse_args()
    sys.stdout.write(measure(select_device(options.device), options.folder).model_dump_json() + "\n")


if __name__ == "__main__":
    main()
    leave(0)
