"""Rows of a matrix to numbers of a scheme by themselves: nearest on the whole ranges, as method rtn rounds.

Every step is by row, or by the rows that share a scale, so slices of whole blocks of rows give the numbers
that the whole matrix would.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from app.core.errors import ModelRefused
from app.core.formats.file_format import Scheme
from kernels.cpu import nearest_numbers
from workers.modeling.float_numbers import float_values
from workers.modeling.quantized_weight import QuantizedWeight
from workers.quantization.float_grids import grid_of_sizes, group_sizes
from workers.quantization.float_rounding import weight_on
from workers.quantization.grid import fit_grid, group_ranges, grouped_view
from workers.quantization.rounding import FoldedLinear, largest_weight, refuse_overflow, round_nearest

BLOCK_ROWS = 128  # a multiple of the rows that share a scale, or words of zero points
SLICE_VALUES = 1 << 21  # of a slice, about
CACHED_VALUES = 1 << 18  # of what PyTorch rounds at a time
SAMPLED_ROWS = 64  # every so many rows the error is measured


class WeightError(NamedTuple):
    """Sums of squares, on sampled rows."""

    error: float
    weight: float

    def __add__(self, other: WeightError) -> WeightError:  # type: ignore[override]  # a sum, not a longer tuple
        return WeightError(self.error + other.error, self.weight + other.weight)

    @property
    def relative(self) -> float:
        return math.sqrt(self.error / self.weight) if self.weight else 0.0


@dataclass(frozen=True)
class RowRounder:
    """How the rows of one linear are rounded; `dtype` is the checkpoint's, whose grid the scales must fit."""

    name: str
    scheme: Scheme
    dtype: torch.dtype
    in_float16: bool  # the files may be run in float16
    largest: Tensor | None = None  # the largest size of the weights under one divisor

    def __call__(self, values: Tensor) -> QuantizedWeight:
        """The numbers of rows (rows, C) in any float dtype: a multiple of BLOCK_ROWS, unless they are last.

        Raises ModelRefused for NaN and infinity, RecipeUnsupported for weights that files can't hold.
        """
        if nearest_numbers.library() is not None:
            return self.block(values)
        rows = self.scheme.kind.block_rows
        step = max(1, CACHED_VALUES // (values.shape[1] * rows)) * rows
        return joined([self.block(values[first : first + step]) for first in range(0, len(values), step)])

    def block(self, values: Tensor) -> QuantizedWeight:
        """Rows that with all that PyTorch computes from them stay in a processor's cache."""
        low, high = group_ranges(grouped_view(values, self.scheme))
        self.check(values, (float(low.amin()), float(high.amax())))
        if self.scheme.kind.numbers == "float":
            grid = grid_of_sizes(group_sizes(low, high), self.scheme, self.dtype, self.largest)
            return weight_on(grid, values, self.scheme)
        return round_nearest(values, fit_grid(low, high, self.scheme, self.dtype), self.scheme)

    def check(self, values: Tensor, bounds: tuple[float, float]) -> None:
        low, high = bounds
        if not math.isfinite(low) or not math.isfinite(high):
            raise ModelRefused(
                f"{self.name}.weight holds NaN or infinite weights",
                code="weights_not_finite", remedy="export the model again from a healthy checkpoint",
            )  # fmt: skip
        if max(-low, high) > largest_weight(self.scheme, in_float16=self.in_float16):
            folded = values.to(torch.float32)  # nothing is folded here
            linear = FoldedLinear(self.name, folded, torch.empty(0), self.scheme, folded)
            refuse_overflow(linear, folded, (self.name,), in_float16=self.in_float16)


def row_slices(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the slices of a matrix."""
    step = max(1, SLICE_VALUES // (columns * BLOCK_ROWS)) * BLOCK_ROWS
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def joined(slices: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The matrix of consecutive slices."""
    if len(slices) == 1:
        return slices[0]
    q, scale, zero = (
        torch.cat([getattr(each, field) for each in slices]) for field in ("q", "scale", "zero")
    )
    return replace(slices[0], q=q, scale=scale, zero=zero)


def weight_error(values: Tensor, rounded: QuantizedWeight) -> WeightError:
    """Of every SAMPLED_ROWS-th row."""
    grid = rounded.scale, rounded.zero
    sums = nearest_numbers.squares(values, rounded.q, grid, numbers_of(rounded.scheme), SAMPLED_ROWS)
    if sums is not None:
        return WeightError(*sums)
    some = slice(None, None, SAMPLED_ROWS)
    sample = replace(rounded, q=rounded.q[some], scale=rounded.scale[some], zero=rounded.zero[some])
    weight = values[some].to(torch.float32)
    error = (sample.dequantize() - weight).to(torch.float64)
    return WeightError(float(error.square().sum()), float(weight.to(torch.float64).square().sum()))


@functools.cache
def numbers_of(scheme: Scheme) -> Tensor:
    """float32: what each code stands for, before zero point and scale."""
    codes = torch.arange(2**scheme.bits).to(torch.uint8)
    return float_values(codes, scheme.bits) if scheme.kind.numbers == "float" else codes.to(torch.float32)
