"""GPTQ: rounding column by column, each error spread over the columns that are not rounded yet.

Frantar et al., arXiv 2210.17323, with static activation order: grids are fixed per group first, then
columns are visited by descending diagonal of H, so a group stays a run of neighbours in the file. Sweeps of
coordinate descent follow (QuantEase, arXiv 2309.01885): a column is moved to its best grid point given all
others. In between the scales of all groups of a row are fitted to its integers. Either can only lower
`tr(E H E^T)`. All of that is done on several grids, and each row keeps the one with the smallest loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.core.errors import RecipeUnsupported
from app.core.formats.file_format import Scheme
from kernels.search.grids import stored_scale
from kernels.search.losses import row_losses
from workers.modeling.quantized_weight import QuantizedWeight
from workers.quantization.grid import Grid

BLOCK = 128  # columns that are finished before the rest of the matrix is updated
DAMPING = 0.01  # of the mean diagonal, added to it
MAX_DAMPING = 1.0
SWEEPS = 2
REFITS = 2  # of the scales, each followed by sweeps
FIT_RANGE = (0.25, 4.0)  # of a fitted scale, relative to the one before
FIT_VALUES = 2**24  # of the normal equations at once: rows x groups x groups


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
        scale, zero = (values.squeeze(-1).T[group].contiguous() for values in (grid.scale, grid.zero))
        return cls(scale, -zero, 2**grid.bits - 1 - zero)

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """Grid points nearest to the values (rows,) of one column."""
        scale = self.scale[column]
        return (values / scale).round_().clamp_(self.low[column], self.high[column]).mul_(scale)


@dataclass(frozen=True)
class GptqRounding:
    """The outcome for one linear."""

    weight: QuantizedWeight
    losses: Tensor  # (rows,): e H e^T
    damping: float  # the share of the mean diagonal that made H positive definite


def round_gptq(
    weight: Tensor, grids: Sequence[Grid], scheme: Scheme, moment: Tensor, dtype: torch.dtype
) -> GptqRounding:
    """weight: (rows, C) float32; moment: (C, C) float32; dtype: of the stored scales, besides float16.

    Raises RecipeUnsupported if H can't be made positive definite.
    """
    linear = OrderedLinear.of(weight, moment)
    best, least = linear.rounded(grids[0], scheme, dtype)
    for grid in grids[1:]:
        rounded, losses = linear.rounded(grid, scheme, dtype)
        best, least = rounded.where(losses < least, best), torch.minimum(losses, least)
    return GptqRounding(best, least, linear.damping)


@dataclass(frozen=True)
class OrderedLinear:
    """A linear and the second moment of its input, the columns in the order in which they are rounded."""

    weight: Tensor  # (rows, C), in the file's order
    moment: Tensor  # (C, C), in the file's order
    order: Tensor
    values: Tensor  # (C, rows), in the order of rounding, as all below
    ordered_moment: Tensor  # with 1 on the diagonal where nothing was seen
    factor: Tensor
    damping: float

    @classmethod
    def of(cls, weight: Tensor, moment: Tensor) -> OrderedLinear:
        diagonal = moment.diagonal()
        order = diagonal.argsort(descending=True, stable=True)
        dead = (diagonal <= 0)[order]
        ordered = moment[order][:, order].clone()
        ordered.diagonal()[dead] = 1.0
        values = weight.T[order].contiguous()
        values[dead] = 0.0  # never read: any value will do, zero is the cheapest
        return cls(weight, moment, order, values, ordered, *inverse_factor(ordered))

    def rounded(self, grid: Grid, scheme: Scheme, dtype: torch.dtype) -> tuple[QuantizedWeight, Tensor]:
        """The integers on this grid, its scales fitted to them, and the loss per row."""
        columns = ColumnGrid.of(grid, self.order)
        rounded = spread_errors(self.values.clone(), columns, self.factor)
        rounded = descend(self.values, rounded, columns, self.ordered_moment)
        integers = integers_of(rounded, columns, self.order)
        for _ in range(REFITS):
            grid = fitted_scales(self.weight, integers, grid, self.moment, dtype)
            columns = ColumnGrid.of(grid, self.order)
            rounded = (integers.T[self.order] + columns.low) * columns.scale
            rounded = descend(self.values, rounded, columns, self.ordered_moment)
            integers = integers_of(rounded, columns, self.order)
        zero = grid.zero.squeeze(-1).to(torch.uint8)
        weights = QuantizedWeight(integers.to(torch.uint8), grid.scale.squeeze(-1), zero, scheme)
        return weights, row_losses(weights.dequantize() - self.weight, self.moment)


def integers_of(rounded: Tensor, columns: ColumnGrid, order: Tensor) -> Tensor:
    """(rows, C) integers as float32, in the file's order of columns."""
    integers = torch.empty_like(rounded)
    integers[order] = (rounded / columns.scale - columns.low).round_()
    return integers.T.contiguous()


def fitted_scales(weight: Tensor, integers: Tensor, grid: Grid, moment: Tensor, dtype: torch.dtype) -> Grid:
    """The grid with the scales that suit these integers best, for the rows whose loss they lower.

    For given steps from zero v a row's loss is quadratic in the scales of its groups: the best ones solve
    `A s = b` with A_gh = v_g H_gh v_h and b_g = v_g (H w)_g. They are rounded to what files hold.
    """
    rows, groups = grid.scale.shape[:2]
    scales = grid.scale.clone()
    products = weight @ moment
    chunk = max(1, FIT_VALUES // groups**2)
    for start in range(0, rows, chunk):
        some = slice(start, min(start + chunk, rows))
        steps = integers[some].view(-1, groups, integers.shape[1] // groups) - grid.zero[some]
        fitted = best_scales(steps, products[some].view_as(steps), moment)
        ratio = fitted / grid.scale[some]
        within = (ratio > FIT_RANGE[0]) & (ratio < FIT_RANGE[1])
        fitted = stored_scale(torch.where(within, fitted, grid.scale[some]), dtype)
        errors = [(steps * s).flatten(1) - weight[some] for s in (grid.scale[some], fitted)]
        before, after = (((error @ moment) * error).sum(dim=1) for error in errors)
        scales[some] = torch.where((after < before)[:, None, None], fitted, grid.scale[some])
    return Grid(scales, grid.zero, grid.bits)


def best_scales(steps: Tensor, products: Tensor, moment: Tensor) -> Tensor:
    """(rows, groups, 1): the solution of the normal equations; NaN or infinite where there is none."""
    rows, groups, size = steps.shape
    matrix = steps.new_empty(rows, groups, groups)
    for group in range(groups):
        spread = steps[:, group] @ moment[group * size : (group + 1) * size]
        matrix[:, group] = (spread.view(rows, groups, size) * steps).sum(dim=2)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(dim=1, keepdim=True) + 1e-30  # groups of zeros have no scale
    solution: Tensor = torch.linalg.solve_ex(matrix, (products * steps).sum(dim=2, keepdim=True))[0]
    return solution


def inverse_factor(moment: Tensor) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the inverse of the damped H, and the damping that it took."""
    damping = DAMPING
    mean = moment.diagonal().mean()
    while damping <= MAX_DAMPING:
        damped = moment.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed) and bool(torch.isfinite(upper).all()):
                return upper, damping
        damping *= 2
    raise RecipeUnsupported(
        "the second moment of a linear's input is not positive definite",
        code="moment_singular",
        remedy="use more calibration text, or method awq or rtn with rounding nearest",
    )


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


def descend(values: Tensor, rounded: Tensor, columns: ColumnGrid, moment: Tensor) -> Tensor:
    """Coordinate descent on `tr(E H E^T)`, E = rounded - values, over the grid points; all (C, rows)."""
    gradient = moment @ (rounded - values)
    diagonal = moment.diagonal().clamp(min=1e-30).tolist()
    for _ in range(SWEEPS):
        for start in range(0, values.shape[0], BLOCK):
            stop = min(start + BLOCK, values.shape[0])
            inner = moment[start:stop, start:stop]
            local, moved = gradient[start:stop].clone(), rounded[start:stop].clone()
            for index in range(stop - start):
                column = start + index
                target = torch.sub(moved[index], local[index], alpha=1 / diagonal[column])
                step = columns.nearest(target, column).sub_(moved[index])
                local.addr_(inner[index], step)
                moved[index].add_(step)
            gradient.addmm_(moment[:, start:stop], moved - rounded[start:stop])
            rounded[start:stop] = moved
    return rounded
