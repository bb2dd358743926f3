"""How fast a device is, as measured once, or assumed where nobody has measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.core.specs import Kept

DeviceKind = Literal["cpu", "cuda"]


class DeviceProfile(Kept):
    """Sustained rates of one device."""

    device: DeviceKind
    measured: bool = True
    matmul: dict[int, float] = Field(min_length=1)  # operations/s by size of square matrices, compute dtype
    matmul_float32: dict[int, float] = Field(min_length=1)  # the same in float32: second moments, search
    elementwise: float = Field(gt=0)  # bytes/s of reading and writing arrays
    disk: float = Field(gt=0)  # bytes/s of writing a file

    def matmul_rate(self, size: int, *, float32: bool = False) -> float:
        """Operations per second for matrices of about `size`: that of the nearest size below."""
        rates = self.matmul_float32 if float32 else self.matmul
        return rates[max((known for known in rates if known <= size), default=min(rates))]


# Assumptions: a small host, a data centre GPU.
NOMINAL: dict[DeviceKind, DeviceProfile] = {
    "cpu": DeviceProfile(
        device="cpu", measured=False, matmul={256: 80e9}, matmul_float32={256: 80e9},
        elementwise=8e9, disk=5e8,
    ),
    "cuda": DeviceProfile(
        device="cuda", measured=False, matmul={256: 10e12, 1024: 100e12, 4096: 300e12},
        matmul_float32={256: 5e12, 1024: 30e12}, elementwise=1.5e12, disk=1e9,
    ),
}  # fmt: skip
