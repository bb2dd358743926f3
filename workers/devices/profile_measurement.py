"""`python -m workers.devices.profile_measurement --device cpu --folder DIR` measures the device it runs on.

A process of its own, because a worker never imports torch. Each rate is a JSON line as soon as it is
measured, so that whoever stops it loses one rate at most.
"""

from __future__ import annotations

from workers.devices.torch_process import leave, use_huge_pages

if __name__ == "__main__":
    use_huge_pages()

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

import torch

from app.core.formats.file_format import Scheme
from app.core.planning.cost_model import FINALISTS, SAMPLED_ROWS, evaluations
from app.core.planning.device_profile import SIZES, WIDTHS, DeviceKind, rate_names
from app.core.records.specs import Recipe, SearchSpec
from kernels.cpu.float_products import use_whole_vectors
from workers.devices.selection import select_device
from workers.quantization.input_statistics import InputStatistics
from workers.quantization.rounding import FoldedLinear, round_linear
from workers.quantization.scale_search import Fold, ScaledLinear, search_scales

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


def elementwise_rate(device: torch.device) -> float:
    values = torch.ones(ARRAY_VALUES, device=device)
    return rate(2 * 4 * ARRAY_VALUES, lambda: values.mul_(1.0), device)


def matmul_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(matrix)
    return rate(2 * size**3, lambda: torch.mm(matrix, matrix, out=out), device)


class SearchSteps:
    """The engine's own steps on a random linear (rows, width): AWQ's settings for 4 bits by default.

    Seconds are per weight, and for scales per candidate.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.width, self.device = width, device
        self.scheme = Scheme(bits=4, group_size=128, symmetric=False)
        self.weight = (torch.randn(SAMPLED_ROWS, width, generator=generator) * width**-0.5).to(device)
        inputs = torch.randn(2 * width, width, generator=generator).to(device)
        moment = inputs.T @ inputs / len(inputs)
        self.statistics = InputStatistics(inputs.abs().mean(dim=0), moment, len(inputs))

    @cached_property
    def nearest(self) -> float:
        return self.rounded(Recipe(method="rtn"))

    @cached_property
    def clipped(self) -> float:
        return self.rounded(Recipe())

    def clip(self) -> float:
        return max(0.0, self.clipped - self.nearest)

    def gptq(self) -> float:
        """On all grids that follow a clip search."""
        return max(0.0, self.rounded(Recipe(method="gptq")) - self.clipped)

    def rounded(self, recipe: Recipe) -> float:
        linear = FoldedLinear("", self.weight, self.statistics.moment, self.scheme, self.weight)
        seconds = seconds_of(lambda: round_linear(linear, recipe, torch.float16), self.device)
        return seconds / SAMPLED_ROWS / self.width

    def scales(self) -> float:
        linears, search = [ScaledLinear.of(self.weight, self.scheme)], SearchSpec()
        fold = Fold(torch.ones(self.width, device=self.device), True, None, torch.float16)
        tried = (evaluations(Recipe()) + FINALISTS) * SAMPLED_ROWS * self.width
        return seconds_of(lambda: search_scales(linears, self.statistics, fold, search), self.device) / tried


def disk_rate(folder: Path) -> float:
    content = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(DISK_BYTES // len(content)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return DISK_BYTES / (time.perf_counter() - started)


def measurements(device: torch.device, folder: Path) -> dict[str, Callable[[], float]]:
    """How each of `rate_names` is measured."""
    kind: DeviceKind = "cuda" if device.type == "cuda" else "cpu"
    ways: dict[str, Callable[[], float]] = {
        "elementwise": lambda: elementwise_rate(device),
        "disk": lambda: disk_rate(folder),
    }
    for size in SIZES[kind]:
        ways[f"matmul_float32 {size}"] = partial(matmul_rate, size, torch.float32, device)
        ways[f"matmul {size}"] = partial(matmul_rate, size, torch.bfloat16, device)
    for width in WIDTHS[kind]:
        steps = SearchSteps(width, device)
        ways[f"nearest {width}"] = partial(getattr, steps, "nearest")
        ways |= {f"{name} {width}": getattr(steps, name) for name in ("scales", "clip", "gptq")}
    return {name: ways[name] for name in rate_names(kind)}


def measure(device: torch.device, folder: Path, skipped: list[str]) -> Iterator[tuple[str, float]]:
    """Each rate by its name, but for those in `skipped`."""
    for name, way in measurements(device, folder).items():
        if name not in skipped:
            yield name, way()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where jobs write")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="a rate that is measured")
    options = parser.parse_args()
    device = select_device(options.device)
    use_whole_vectors(device)
    for name, measured in measure(device, options.folder, options.skip):
        sys.stdout.write(json.dumps({name: measured}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
    leave(0)
