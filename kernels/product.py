"""The product that a backend is selected for, described without a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.checks import DTYPES, check_dtype, check_scheme
from kernels.weight import PackedWeight


@dataclass(frozen=True)
class LinearProduct:
    """x (..., in_features) in `dtype` times a packed weight, on one device.

    Raises TypeError or ValueError for what no backend computes.
    """

    bits: int
    group_size: int
    in_features: int
    out_features: int
    asymmetric: bool
    dtype: torch.dtype
    device_type: str
    capability: tuple[int, int] | None = None  # of a CUDA device: (9, 0) is Hopper

    def __post_init__(self) -> None:
        check_scheme(self.bits, self.group_size, self.in_features)
        check_dtype("dtype", self.dtype, DTYPES)
        if self.out_features < 1:
            raise ValueError(f"out_features={self.out_features}; allowed: 1 and more")

    @classmethod
    def of(cls, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> LinearProduct:
        """The problem that `weight` poses on `device`."""
        return cls(
            bits=weight.bits,
            group_size=weight.group_size,
            in_features=weight.in_features,
            out_features=weight.out_features,
            asymmetric=weight.zero is not None,
            dtype=dtype,
            device_type=device.type,
            capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        )
