"""Integer grids: range to scale and zero point (kernels/search/grids.py), weights to integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from kernels.cpu import nearest_numbers
from kernels.search.grids import GridRule

FLOAT16_LIMIT = 0.25 * 65504  # headroom under float16's largest value for what is folded


@dataclass(frozen=True)
class Grid:
    """float32 (..., groups, 1): values are (q - zero) * scale, with q in 0..2^bits-1."""

    scale: Tensor
    zero: Tensor
    bits: int

    def integers(self, grouped: Tensor) -> Tensor:
        """Nearest integers, uint8, of weights shaped (..., groups, group_size); NaN has none."""
        top = 2**self.bits - 1
        integers = nearest_numbers.nearest_integers(grouped, self.scale, self.zero, top)
        if integers is None:
            steps = torch.round(grouped.to(torch.float32) / self.scale) + self.zero
            integers = steps.clamp_(0, top).to(torch.uint8)
        return integers

    def nearest(self, grouped: Tensor) -> Tensor:
        """Weights moved to their nearest grid points, same shape."""
        steps = (grouped / self.scale).round_()
        return steps.clamp_(-self.zero, 2**self.bits - 1 - self.zero).mul_(self.scale)


def grouped_view(weight: Tensor, scheme: Scheme) -> Tensor:
    """(rows, groups, group_size) view of (rows, in_features)."""
    return weight.view(weight.shape[0], scheme.groups(weight.shape[1]), -1)


def group_ranges(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest weight of each group, float32 (..., 1)."""
    ranges = nearest_numbers.ranges(grouped)
    if ranges is None:
        low, high = grouped.aminmax(dim=-1, keepdim=True)
        ranges = low.to(torch.float32), high.to(torch.float32)
    return ranges


def fit_grid(low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
    """The grid of the range [low, high], both (..., groups, 1) float32."""
    scale, zero = GridRule(scheme.bits, scheme.symmetric, dtype).fit(low, high)
    return Grid(scale, zero, scheme.bits)


def min_max_grid(grouped: Tensor, scheme: Scheme, dtype: torch.dtype, *, factor: float = 1.0) -> Grid:
    """The grid of the full range of each group, or of `factor` of it."""
    low, high = group_ranges(grouped)
    if factor != 1.0:
        low, high = low * factor, high * factor
    return fit_grid(low, high, scheme, dtype)
