"""Columns of a weight in turn, each rounded to its grid after what the ones before it leave.

GPTQ's inner loop and that of coordinate descent. PyTorch's operators take several small launches a column;
where kernels/csrc/cpu/columns.h can be compiled it is one pass over rows that lie in vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.search import cpu

MOST_COLUMNS = 128  # kTurns of columns.h


@dataclass(frozen=True)
class ColumnGrid:
    """The grids of columns, transposed like the weights here: a column's values are neighbours.

    Values are whole numbers from `low` to `low + steps`, times the scale.
    """

    scale: Tensor  # (groups, rows) float32
    low: Tensor  # (groups, rows) float32
    group: Tensor  # (columns,) int64
    steps: int  # the largest integer

    def of(self, columns: slice) -> ColumnGrid:
        """The grids of some of the columns."""
        return ColumnGrid(self.scale, self.low, self.group[columns], self.steps)

    def steps_of(self, rounded: Tensor) -> Tensor:
        """The whole numbers behind values on the grid, (columns, rows) both."""
        return (rounded / self.scale[self.group]).round_()

    def values_of(self, steps: Tensor) -> Tensor:
        """The values of these whole numbers."""
        return steps * self.scale[self.group]

    def nearest(self, values: Tensor, group: int) -> Tensor:
        """Grid points nearest to the values (rows,) of a column of this group."""
        low, scale = self.low[group], self.scale[group]
        return (values / scale).round_().clamp_(low, low + self.steps).mul_(scale)


def round_columns(
    target: Tensor, coefficients: Tensor, grid: ColumnGrid, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The rounded columns, and their changes.

    Column n is rounded to the grid point nearest to `target[n] + sum over k < n of
    coefficients[k, n] change[k]`. Its change is what rounding it takes away, or with `before` what it becomes
    less what it was.

    target, before, and both results: (columns, rows) float32, rows neighbours. coefficients: (columns,
    columns), of which those above the diagonal count. At most 128 columns.
    """
    if len(target) > MOST_COLUMNS:
        raise ValueError(f"{len(target)} columns; allowed: at most {MOST_COLUMNS}")
    for name, tensor in (("target", target), ("before", before), ("coefficients", coefficients)):
        if tensor is not None and tensor.stride(1) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}; allowed: neighbours in a row at 1")
    rounded, change = torch.empty_like(target), torch.empty_like(target)
    if target.device.type == "cpu":
        values = (target, before, rounded, change, coefficients)
        if cpu.round_columns(values, (grid.scale, grid.low, grid.group), grid.steps):
            return rounded, change
    target = target.clone()
    for column, group in enumerate(grid.group.tolist()):
        value = target[column]
        rounded[column] = grid.nearest(value, group)
        if before is None:
            torch.sub(value, rounded[column], out=change[column])
        else:
            torch.sub(rounded[column], before[column], out=change[column])
        target[column + 1 :].addr_(coefficients[column, column + 1 :], change[column])
    return rounded, change
