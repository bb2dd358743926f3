"""GPTQ: rounding column by column, each error spread over the columns that are not rounded yet.

Frantar et al., arXiv 2210.17323, with static activation order: grids are fixed per group first, then
columns are visited by descending diagonal of H, so a group stays a run of neighbours in the file. Sweeps of
coordinate descent follow (QuantEase, arXiv 2309.01885): a column is moved to its best grid point given all
others, which can only lower `tr(E H E^T)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from app.core.errors import RecipeUnsupported
from app.core.format_limits import Scheme
from workers.modeling.quantized_weight import QuantizedWeight
from workers.quantization.grid import Grid

BLOCK = 128  # columns that are finished before the rest of the matrix is updated
DAMPING = 0.01  # of the mean diagonal, added to it
MAX_DAMPING = 1.0
SWEEPS = 2


@dataclass(frozen=True)
class ColumnGrid:
    """The grid of every column, transposed like the weights: (C, rows) float32.

    Transposed, a column of the weight is contiguous, and all work here goes column by column.
    """

    scale: Tensor
    low: Tensor  # the smallest and the largest step from zero
    high: Tensor

    @classmethod
    def of(cls, grid: Grid, order: Tensor) -> ColumnGrid:
        """Of the columns in `order`."""
        group = order // (order.numel() // grid.scale.shape[1])
        scale, zero = (part.squeeze(-1).T[group].contiguous() for part in (grid.scale, grid.zero))
        return cls(scale, -zero, 2**grid.bits - 1 - zero)

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """Grid points nearest to the values (rows,) of one column."""
        scale = self.scale[column]
        return (values / scale).round_().clamp_(self.low[column], self.high[column]).mul_(scale)


@dataclass(frozen=True)
class GptqRounding:
    """The outcome for one linear."""

    weight: QuantizedWeight
    damping: float  # the share of the mean diagonal that made H positive definite


def round_gptq(weight: Tensor, grid: Grid, scheme: Scheme, moment: Tensor) -> GptqRounding:
    """weight: (rows, C) float32; moment: (C, C) float32.

    Raises RecipeUnsupported if H can't be made positive definite.
    """
    diagonal = moment.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    dead = (diagonal <= 0)[order]
    hessian = moment[order][:, order].clone()
    hessian.diagonal()[dead] = 1.0
    values = weight.T[order].contiguous()
    values[dead] = 0.0  # never read: any value will do, zero is the cheapest
    columns = ColumnGrid.of(grid, order)
    factor, damping = inverse_factor(hessian)
    rounded = spread_errors(values.clone(), columns, factor)
    rounded = descend(values, rounded, columns, hessian)
    integers = (rounded / columns.scale - columns.low).round_()
    q = torch.empty_like(integers, dtype=torch.uint8)
    q[order] = integers.to(torch.uint8)
    zero = grid.zero.squeeze(-1).to(torch.uint8)
    return GptqRounding(QuantizedWeight(q.T.contiguous(), grid.scale.squeeze(-1), zero, scheme), damping)


def inverse_factor(hessian: Tensor) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the inverse of the damped H, and the damping that it took."""
    damping = DAMPING
    mean = hessian.diagonal().mean()
    while damping <= MAX_DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed) and bool(torch.isfinite(upper).all()):
                return upper, damping
        damping *= 2
    raise RecipeUnsupported(
        "the second moment of a linear's input is not positive definite",
        code="moment_singular", remedy="use more calibration text, or rounding nearest",
    )  # fmt: skip


def spread_errors(values: Tensor, columns: ColumnGrid, factor: Tensor) -> Tensor:
    """The rounded (C, rows) matrix; `values` is used up."""
    rounded = torch.empty_like(values)
    count = values.shape[0]
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        errors = torch.empty_like(values[start:stop])
        for column in range(start, stop):
            rounded[column] = columns.nearest(values[column], column)
            error = torch.div(
                values[column] - rounded[column], factor[column, column], out=errors[column - start]
            )
            values[column:stop].addr_(factor[column, column:stop], error, alpha=-1)
        values[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return rounded


def descend(values: Tensor, rounded: Tensor, columns: ColumnGrid, hessian: Tensor) -> Tensor:
    """Coordinate descent on `tr(E H E^T)`, E = rounded - values, over the grid points; all (C, rows)."""
    gradient = hessian @ (rounded - values)
    diagonal = hessian.diagonal().clamp(min=1e-30).tolist()
    for _ in range(SWEEPS):
        for start in range(0, values.shape[0], BLOCK):
            stop = min(start + BLOCK, values.shape[0])
            inner = hessian[start:stop, start:stop]
            local, moved = gradient[start:stop].clone(), rounded[start:stop].clone()
            for index in range(stop - start):
                column = start + index
                wanted = torch.sub(moved[index], local[index], alpha=1 / diagonal[column])
                step = columns.nearest(wanted, column).sub_(moved[index])
                local.addr_(inner[index], step)
                moved[index].add_(step)
            gradient.addmm_(hessian[:, start:stop], moved - rounded[start:stop])
            rounded[start:stop] = moved
    return rounded
