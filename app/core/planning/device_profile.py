"""The speed of a device, measured once, or assumed where it was not measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.core.records.specs import Kept

DeviceKind = Literal["cpu", "cuda"]
# Steps of the engine that are measured as they are. `scales` counts every candidate of a weight once.
SearchStep = Literal["scales", "nearest", "clip", "gptq"]


class DeviceProfile(Kept):
    """Sustained rates of one device."""

    device: DeviceKind
    measured: bool = True
    matmul: dict[int, float] = Field(min_length=1)  # operations/s by size of square matrices, compute dtype
    matmul_float32: dict[int, float] = Field(min_length=1)  # the same in float32: second moments, search
    elementwise: float = Field(gt=0)  # bytes/s of reading and writing arrays
    disk: float = Field(gt=0)  # bytes/s of writing a file
    # Seconds per weight by in_features; workers of older versions have not measured them.
    search: dict[SearchStep, dict[int, float]] = Field(default_factory=dict)

    def matmul_rate(self, size: int, *, float32: bool = False) -> float:
        """Operations per second for matrices of about `size`, from the nearest measured size below."""
        rates = self.matmul_float32 if float32 else self.matmul
        return rates[max((measured for measured in rates if measured <= size), default=min(rates))]

    def search_seconds(self, step: SearchStep, width: int) -> float:
        """Seconds per weight of a linear with `width` in_features, which products with H make grow."""
        points = sorted((self.search.get(step) or NOMINAL[self.device].search[step]).items())
        if width <= points[0][0] or len(points) == 1:
            return points[0][1]
        (low, first), (high, last) = points[-2:]
        return max(min(first, last), last + (last - first) * (width - high) / (high - low))


# Assumptions: a small host, a data centre GPU.
NOMINAL: dict[DeviceKind, DeviceProfile] = {
    "cpu": DeviceProfile(
        device="cpu", measured=False, matmul={256: 80e9}, matmul_float32={256: 80e9},
        elementwise=8e9, disk=5e8,
        search={
            "scales": {256: 5e-9, 1024: 6.5e-9}, "nearest": {256: 1.6e-8, 1024: 2e-8},
            "clip": {256: 1.4e-7, 1024: 1.1e-7}, "gptq": {256: 2.4e-6, 1024: 3.2e-6},
        },
    ),
    "cuda": DeviceProfile(
        device="cuda", measured=False, matmul={256: 10e12, 1024: 100e12, 4096: 300e12},
        matmul_float32={256: 5e12, 1024: 30e12}, elementwise=1.5e12, disk=1e9,
        search={
            "scales": {4096: 3.5e-11, 14336: 4.5e-11}, "nearest": {4096: 1.2e-10},
            "clip": {4096: 5e-10, 14336: 8e-10}, "gptq": {4096: 2e-8},
        },
    ),
}  # fmt: skip
