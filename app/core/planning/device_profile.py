"""The speed of a device, measured once, or assumed where it was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from pydantic import Field

from app.core.records.specs import Kept

DeviceKind = Literal["cpu", "cuda"]
# Steps of the engine that are measured as they are. `scales` counts every candidate of a weight once.
SearchStep = Literal["scales", "nearest", "clip", "gptq"]
Basis = Literal["measured", "measured in part", "nominal"]
Table = dict[int, float]
# Where rates are measured: sizes of square matrices, and in_features of linears that are searched.
SIZES: dict[DeviceKind, tuple[int, ...]] = {
    "cpu": (256, 512, 1024, 2048), "cuda": (256, 512, 1024, 2048, 4096),
}  # fmt: skip
WIDTHS: dict[DeviceKind, tuple[int, ...]] = {"cpu": (256, 1024), "cuda": (1024, 4096)}

MEASURING_LIMIT_S = 30.0  # of all measuring by one worker


class DeviceProfile(Kept):
    """Sustained rates of one device."""

    device: DeviceKind
    assumed: tuple[str, ...] = ()  # the rates that were not measured, by `rate_names`
    matmul: Table = Field(min_length=1)  # operations/s by size of square matrices, compute dtype
    matmul_float32: Table = Field(min_length=1)  # the same in float32: second moments, search
    elementwise: float = Field(gt=0)  # bytes/s of reading and writing arrays
    disk: float = Field(gt=0)  # bytes/s of writing a file
    # Seconds per weight by in_features; workers of older versions have not measured them.
    search: dict[SearchStep, Table] = Field(default_factory=dict)

    @property
    def basis(self) -> Basis:
        """What predictions with these rates rest on."""
        if not self.assumed:
            return "measured"
        return "nominal" if set(self.assumed) == set(rate_names(self.device)) else "measured in part"

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


def rate_names(device: DeviceKind) -> tuple[str, ...]:
    """Every rate of a device that is measured: the cheap ones and those that matter most come first."""
    sizes, widths = SIZES[device], WIDTHS[device]
    compute = [f"matmul {size}" for size in sizes] if device == "cuda" else []  # a CPU computes in float32
    return (
        "elementwise", *[f"matmul_float32 {size}" for size in sizes], *compute, "disk",
        *[f"{step} {width}" for step in get_args(SearchStep) for width in widths],
    )  # fmt: skip


def rates_notes(profile: DeviceProfile) -> tuple[str, ...]:
    """What a reader of times should know that were predicted with these rates."""
    if profile.basis == "measured":
        return ()
    if profile.basis == "nominal":
        return ("times are rough: no rate of this device is measured yet, all are assumed",)
    names = ", ".join(profile.assumed)
    return (f"times are rough: some rates of this device are not measured but assumed ({names})",)


def profile_of(device: DeviceKind, rates: Mapping[str, float]) -> DeviceProfile:
    """The profile with these rates, by `rate_names`.

    What is missing is nominal, at the pace at which this device multiplies matrices, if that was measured.
    """
    nominal, names = NOMINAL[device], rate_names(device)
    measured: dict[str, Table] = {}
    for name in filter(rates.__contains__, names):
        kind, _, size = name.partition(" ")
        measured.setdefault(kind, {})[int(size or 0)] = rates[name]
    float32 = measured.get("matmul_float32", {})
    smallest = min(float32, default=0)
    pace = float32[smallest] / nominal.matmul_rate(smallest, float32=True) if float32 else 1.0

    def scaled(table: Table, factor: float) -> Table:
        return {size: rate * factor for size, rate in table.items()}

    matmul_float32 = float32 or nominal.matmul_float32
    return DeviceProfile(
        device=device,
        assumed=tuple(name for name in names if name not in rates),
        matmul=measured.get("matmul")
        or (matmul_float32 if device == "cpu" else scaled(nominal.matmul, pace)),
        matmul_float32=matmul_float32,
        elementwise=rates.get("elementwise", nominal.elementwise * pace),
        disk=rates.get("disk", nominal.disk),
        search={
            step: measured.get(step) or scaled(table, 1 / pace) for step, table in nominal.search.items()
        },
    )


# Assumptions: a small host, a data centre GPU.
NOMINAL: dict[DeviceKind, DeviceProfile] = {
    "cpu": DeviceProfile(
        device="cpu", assumed=rate_names("cpu"), matmul={256: 80e9}, matmul_float32={256: 80e9},
        elementwise=8e9, disk=5e8,
        search={
            "scales": {256: 5e-9, 1024: 6.5e-9}, "nearest": {256: 1.6e-8, 1024: 2e-8},
            "clip": {256: 1.4e-7, 1024: 1.1e-7}, "gptq": {256: 3e-7, 1024: 7e-7},
        },
    ),
    "cuda": DeviceProfile(
        device="cuda", assumed=rate_names("cuda"), matmul={256: 10e12, 1024: 100e12, 4096: 300e12},
        matmul_float32={256: 5e12, 1024: 30e12}, elementwise=1.5e12, disk=1e9,
        search={
            "scales": {4096: 3.5e-11, 14336: 4.5e-11}, "nearest": {4096: 1.2e-10},
            "clip": {4096: 5e-10, 14336: 8e-10}, "gptq": {4096: 2e-8},
        },
    ),
}  # fmt: skip
