"""Devices that models are served on: memory, bandwidth and rates as their makers publish them.

Rates are dense (data sheets often print them with sparsity, which doubles them), with accumulation in
float32 where a data sheet tells them apart. Sources, by name:

- a10: NVIDIA A10 data sheet (24 GB, 600 GB/s, 125 TFLOPS, 250 TOPS).
- a100: NVIDIA A100 data sheet, 80 GB SXM (2039 GB/s, 312 TFLOPS, 624 TOPS).
- l4: NVIDIA L4 data sheet (24 GB, 300 GB/s; 242 and 485 TFLOPS with sparsity).
- l40s: NVIDIA L40S data sheet (48 GB, 864 GB/s, 362.05 and 733 TFLOPS).
- rtx4090: NVIDIA Ada GPU architecture paper, appendix A (24 GB, 1008 GB/s, 165.2, 330.3, 660.6 for int8).
- h100: NVIDIA H100 data sheet, SXM (80 GB, 3.35 TB/s; 1979 and 3958 TFLOPS with sparsity).
- h200: NVIDIA H200 data sheet, SXM (141 GB, 4.8 TB/s, rates as H100).
- b200: NVIDIA Blackwell data sheet, HGX B200 (180 GB, 7.7 TB/s; 4.5, 9 and 18 PFLOPS with sparsity).
- rtx5090: NVIDIA RTX Blackwell architecture paper, appendix A (32 GB, 1792 GB/s, 209.5, 419, 838 for int8;
  FP4 1676).
- mi300x: AMD Instinct MI300X data sheet (192 GB, 5.3 TB/s, 1307.4 and 2614.9 TFLOPS).

Of a CPU nothing is assumed: processors and their memory differ too much.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

from app.core.records.device_names import DeviceName
from app.core.records.specs import Frozen

Platform = Literal["cuda", "rocm", "cpu"]
Multiplied = Literal["16 bits", "int8", "fp8", "fp4"]  # the numbers that a product is computed from
GB, TERA = 10**9, 10.0**12


class ServingDevice(Frozen):
    """One device. `rates` are operations per second by what is multiplied; absent is what it can't."""

    title: str
    platform: Platform
    capability: float = 0.0  # of CUDA; 0 elsewhere
    memory: int | None = None  # bytes
    bandwidth: float | None = None  # bytes per second
    rates: Mapping[Multiplied, float] = {}


def gpu(
    title: str,
    capability: float,
    memory_bandwidth: tuple[int, float],
    rates: tuple[float, ...],
    platform: Platform = "cuda",
) -> ServingDevice:
    """(GB, GB/s), and TFLOPS of 16 bits, int8, FP8 and FP4, as many of them as it has."""
    names: tuple[Multiplied, ...] = ("16 bits", "int8", "fp8", "fp4")
    return ServingDevice(
        title=title,
        platform=platform,
        capability=capability,
        memory=memory_bandwidth[0] * GB,
        bandwidth=memory_bandwidth[1] * GB,
        rates={name: rate * TERA for name, rate in zip(names, rates, strict=False)},
    )


DEVICES: Mapping[DeviceName, ServingDevice] = {
    "a10": gpu("NVIDIA A10", 8.6, (24, 600), (125, 250)),
    "a100": gpu("NVIDIA A100 80 GB", 8.0, (80, 2039), (312, 624)),
    "l4": gpu("NVIDIA L4", 8.9, (24, 300), (121, 242.5, 242.5)),
    "l40s": gpu("NVIDIA L40S", 8.9, (48, 864), (362.05, 733, 733)),
    "rtx4090": gpu("NVIDIA GeForce RTX 4090", 8.9, (24, 1008), (165.2, 660.6, 330.3)),
    "h100": gpu("NVIDIA H100 SXM", 9.0, (80, 3350), (989.5, 1979, 1979)),
    "h200": gpu("NVIDIA H200 SXM", 9.0, (141, 4800), (989.5, 1979, 1979)),
    "b200": gpu("NVIDIA B200", 10.0, (180, 7700), (2250, 4500, 4500, 9000)),
    "rtx5090": gpu("NVIDIA GeForce RTX 5090", 12.0, (32, 1792), (209.5, 838, 419, 1676)),
    "mi300x": gpu("AMD Instinct MI300X", 0.0, (192, 5300), (1307.4, 2614.9, 2614.9), "rocm"),
    "cpu": ServingDevice(title="CPU", platform="cpu"),
}


def device_called(driver_name: str) -> DeviceName | None:
    """The device of a driver's name such as `NVIDIA H100 80GB HBM3`; None if it is none of these."""
    words = driver_name.lower().replace("-", " ").split()
    if "laptop" in words:
        return None
    pairs = {first + second for first, second in pairwise(words)}
    return next((name for name in DEVICES if name != "cpu" and (name in words or name in pairs)), None)
