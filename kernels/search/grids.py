"""From a range of weights to the grid that a file can hold, and from weights to the points of that grid.

A range always holds zero, so zero is exact, as the compressed-tensors format expects. Scales are rounded
to the dtypes of the files before integers are computed from them (a scale that changes when it is stored
moves every weight of its group).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.checks import BITS, DTYPES, check_dtype, check_one_of

LARGEST_SCALE = 65280.0  # the largest value that float16 and bfloat16 both hold


@dataclass(frozen=True)
class GridRule:
    """How a range becomes scale and zero point.

    Symmetric: scale = absmax / ((2^bits - 1) / 2) and the zero point 2^(bits-1), as compressed-tensors.
    """

    bits: int
    symmetric: bool
    dtype: torch.dtype  # that must hold the scales, besides float16

    def __post_init__(self) -> None:
        check_one_of("bits", self.bits, BITS)
        check_dtype("scale_dtype", self.dtype, DTYPES)

    @property
    def steps(self) -> int:
        """The largest integer."""
        return int(2**self.bits - 1)

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the range [low, high], float32 of any shape."""
        if self.symmetric:
            scale = stored_scale(torch.maximum(high.abs(), low.abs()) * (2 / self.steps), self.dtype)
            return scale, torch.full_like(scale, float(2 ** (self.bits - 1)))
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = stored_scale((high - low) / self.steps, self.dtype)
        return scale, torch.round(-low / scale).clamp_(0, self.steps)

    def nearest(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The values moved to their nearest grid points."""
        steps = (values / scale).round_()
        # Bounds that differ from row to row: clamp_ is three times slower on a CPU.
        torch.maximum(steps, -zero, out=steps)
        torch.minimum(steps, self.steps - zero, out=steps)
        return steps.mul_(scale)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest scale that float16 and `dtype` both hold exactly; 1 where the range has no width.

    float16 first: its subnormals are multiples of 2^-24 below 2^-14, and rounding those to bfloat16's
    eight bits leaves a multiple of 2^-24.
    """
    rounded = scale.clamp(max=LARGEST_SCALE).to(torch.float16).to(dtype).to(torch.float32)
    return torch.where(rounded > 0, rounded, torch.ones_like(rounded))
