"""The CUDA part of kernels.py: rates of the device, and calls timed in graphs."""

from __future__ import annotations

import argparse
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
GIB = 1024**3
L2_FACTOR = 4  # copies of a weight take this many times the cache
MIN_CALLS = 24  # in one graph, and REPLAYS of it; a slow product gets by with its copies, replayed thrice
REPLAYS = 7
SLOW_S = 1e-3


def read_rate() -> float:
    """Bytes per second of a large copy, reads and writes counted."""
    source = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), 9)


def product_rate() -> float:
    """Operations per second of a large dense bfloat16 product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / median_seconds(lambda: a @ b, 9)


def median_seconds(call: Callable[[], object], times: int) -> float:
    found = []
    for _ in range(times + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) * 1e-3)
    return statistics.median(found[2:])


def time_calls(copies: list[Product], x: Tensor) -> list[float]:
    """Seconds of a call: the copies in turn, captured in one graph, which is replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        copies[0](x)
        slow = median_seconds(lambda: copies[1](x), 1) > SLOW_S
        count = len(copies) if slow else max(len(copies), MIN_CALLS)
        calls = [copies[index % len(copies)] for index in range(count)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for product in calls:
                product(x)
        return [median_seconds(graph.replay, 1) / len(calls) for _ in range(3 if slow else REPLAYS)]


def device_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What `kernels.Device` wants, but for its peers."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": f"{properties.name}, driver {driver_version()}",
        "torch_device": torch.device("cuda", 0),
        "read_rate": options.read_gbps * 1e9 if options.read_gbps else read_rate(),
        "product_rate": product_rate(),
        "rotation_bytes": max(L2_FACTOR * properties.L2_cache_size, options.rotation_mib * 1024**2),
    }


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
