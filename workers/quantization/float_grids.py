"""Grids of numbers with an exponent: from the sizes of a group's weights to its scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from kernels.cpu import nearest_numbers
from workers.modeling.float_numbers import (
    FP4_LARGEST,
    FP8_LARGEST,
    float_codes,
    float_values,
    fp8_scales,
    largest_float,
    microscale,
    power_of_two,
)
from workers.quantization.grid import group_ranges

SMALLEST = 1e-30  # in place of the scale of a group of zeros


@dataclass(frozen=True)
class FloatGrid:
    """float32 (..., groups, 1) scales; values are numbers of `bits` bits times the scale."""

    scale: Tensor
    bits: int
    divisor: Tensor | None = None  # (1,): scales are FP8 divided by it

    def codes(self, grouped: Tensor) -> Tensor:
        """uint8 codes of weights shaped (..., groups, group_size)."""
        codes = nearest_numbers.nearest_floats(grouped, self.scale, self.bits)
        return float_codes(grouped.to(torch.float32) / self.scale, self.bits) if codes is None else codes

    def nearest(self, grouped: Tensor) -> Tensor:
        """Weights moved to their nearest grid points, same shape."""
        return float_values(self.codes(grouped), self.bits) * self.scale


def float_grid(
    grouped: Tensor, scheme: Scheme, dtype: torch.dtype, largest: Tensor | None = None
) -> FloatGrid:
    """The grid of the whole range of each group; grouped: (..., rows, groups, group_size).

    `largest`: the largest size of all weights under one divisor; by default those here.
    """
    return grid_of_sizes(group_sizes(*group_ranges(grouped)), scheme, dtype, largest)


def group_sizes(low: Tensor, high: Tensor) -> Tensor:
    """The largest size in each group, from its range."""
    return torch.maximum(-low, high)


def grid_of_sizes(
    sizes: Tensor, scheme: Scheme, dtype: torch.dtype, largest: Tensor | None = None
) -> FloatGrid:
    """The grid of groups with these largest sizes, float32 (..., rows, groups, 1)."""
    sizes = block_largest(sizes, scheme)
    divisor = None
    if scheme.kind.scales == "e4m3":
        largest = sizes.amax() if largest is None else largest
        divisor = (FP8_LARGEST * FP4_LARGEST / largest.clamp(min=SMALLEST)).to(torch.float32).reshape(1)
    return FloatGrid(
        stored_scales(sizes / largest_float(scheme.bits), scheme, dtype, divisor), scheme.bits, divisor
    )


def block_largest(sizes: Tensor, scheme: Scheme) -> Tensor:
    """(..., rows, groups, 1): the largest of all rows that share a scale."""
    rows = scheme.kind.block_rows
    if rows == 1 or sizes.shape[-3] % rows:  # rows of a sample stand for themselves
        return sizes
    blocks = sizes.view(*sizes.shape[:-3], -1, rows, *sizes.shape[-2:])
    return blocks.amax(dim=-3, keepdim=True).expand_as(blocks).reshape(sizes.shape)


def stored_scales(scales: Tensor, scheme: Scheme, dtype: torch.dtype, divisor: Tensor | None) -> Tensor:
    """The nearest scales that files hold, for positive `scales`; `dtype`: of plain ones."""
    match scheme.kind.scales:
        case "e4m3":
            assert divisor is not None
            return fp8_scales(scales, divisor)
        case "e8m0":
            sizes = scales.clamp(min=SMALLEST) * largest_float(scheme.bits)
            return microscale(sizes)
        case _:
            rounded = scales.to(dtype).to(torch.float32)
            return torch.where(rounded > 0, rounded, torch.ones_like(rounded))


def neighbour_scales(grid: FloatGrid, scheme: Scheme, dtype: torch.dtype, factor: float) -> FloatGrid:
    """The grid with every scale changed by `factor`, as files hold it."""
    scale = grid.scale * factor
    stored = (
        power_of_two(scale)
        if scheme.kind.scales == "e8m0"
        else stored_scales(scale, scheme, dtype, grid.divisor)
    )
    return FloatGrid(stored, grid.bits, grid.divisor)


def float_rounding_errors(weight: Tensor, scales: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """(candidates, rows, C): the change of the weight (rows, C) by rounding `weight diag(s)` to its grid, for
    each row s of `scales` (candidates, C)."""
    scaled = weight * scales[:, None, :]
    grouped = scaled.view(*scaled.shape[:-1], scheme.groups(weight.shape[1]), -1)
    rounded = float_grid(grouped, scheme, dtype).nearest(grouped).flatten(-2)
    return (rounded - scaled).div_(scales[:, None, :])
