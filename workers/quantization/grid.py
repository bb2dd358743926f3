"""Integer grids: range to scale and zero point, weights to integers.

A range always holds zero, so zero is exact, as the compressed-tensors format expects. Scales are rounded
to the dtypes of the files before integers are computed from them (a scale that changes when it is stored
moves every weight of its group).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from app.core.format_limits import Scheme

LARGEST_SCALE = 65280.0  # the largest value that float16 and bfloat16 both hold


@dataclass(frozen=True)
class Grid:
    """float32 (..., groups, 1): values are (q - zero) * scale, with q in 0..2^bits-1."""

    scale: Tensor
    zero: Tensor
    bits: int

    def integers(self, grouped: Tensor) -> Tensor:
        """Nearest integers, float32, of weights shaped (..., groups, group_size)."""
        return (torch.round(grouped / self.scale) + self.zero).clamp_(0, 2**self.bits - 1)

    def nearest(self, grouped: Tensor) -> Tensor:
        """Weights moved to their nearest grid points, same shape."""
        steps = (grouped / self.scale).round_()
        return steps.clamp_(-self.zero, 2**self.bits - 1 - self.zero).mul_(self.scale)


def grouped_view(weight: Tensor, scheme: Scheme) -> Tensor:
    """(rows, groups, group_size) view of (rows, in_features)."""
    return weight.view(weight.shape[0], scheme.groups(weight.shape[1]), -1)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest scale that float16 and `dtype` both hold exactly; 1 where the range has no width.

    float16 first: its subnormals are multiples of 2^-24 below 2^-14, and rounding those to bfloat16's
    eight bits leaves a multiple of 2^-24.
    """
    rounded = scale.clamp(max=LARGEST_SCALE).to(torch.float16).to(dtype).to(torch.float32)
    return torch.where(rounded > 0, rounded, torch.ones_like(rounded))


def fit_grid(low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
    """The grid of the range [low, high], both (..., groups, 1) float32.

    Symmetric: scale = absmax / ((2^bits - 1) / 2) and the zero point 2^(bits-1), as compressed-tensors.
    """
    steps = 2**scheme.bits - 1
    if scheme.symmetric:
        scale = stored_scale(torch.maximum(high.abs(), low.abs()) * (2 / steps), dtype)
        zero = torch.full_like(scale, float(2 ** (scheme.bits - 1)))
    else:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = stored_scale((high - low) / steps, dtype)
        zero = torch.round(-low / scale).clamp_(0, steps)
    return Grid(scale, zero, scheme.bits)


def min_max_grid(grouped: Tensor, scheme: Scheme, dtype: torch.dtype, *, factor: float = 1.0) -> Grid:
    """The grid of the full range of each group, or of `factor` of it."""
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    if factor != 1.0:
        low, high = low * factor, high * factor
    return fit_grid(low, high, scheme, dtype)
