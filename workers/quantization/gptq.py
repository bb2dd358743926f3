"""GPTQ: rounding column by column, each error spread over the columns that are not rounded yet.

Frantar et al., arXiv 2210.17323, with static activation order: grids are fixed per group first, then
columns are visited by descending diagonal of H, so a group stays a run of neighbours in the file. That is
done on several grids, and each row goes on from the one that leaves it the smallest loss. Sweeps of
coordinate descent follow (QuantEase, arXiv 2309.01885): a column is moved to its best grid point given all
others. In between the scales of all groups of a row are fitted to its integers. Either can only lower
`tr(E H E^T)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.core.errors import RecipeUnsupported
from app.core.formats.file_format import Scheme
from kernels.search.columns import ColumnGrid, round_columns
from kernels.search.grids import stored_scale
from workers.modeling.quantized_weight import QuantizedWeight
from workers.quantization.grid import Grid
from workers.quantization.inverse_triangle import inverse_lower

BLOCK = 128  # columns that are finished before the rest of the matrix is updated
DAMPING = 0.01  # of the mean diagonal, added to it
MAX_DAMPING = 1.0
SWEEPS = 2
REFITS = 2  # of the scales, each followed by sweeps
FIT_RANGE = (0.25, 4.0)  # of a fitted scale, relative to the one before
FIT_VALUES = 2**24  # of the normal equations at once: rows x groups x groups


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
    rounded, columns = linear.started([linear.columns(grid) for grid in grids])
    gradient = linear.descend(rounded, columns)
    for _ in range(REFITS):
        steps = columns.steps_of(rounded)
        columns = linear.fitted(steps, gradient, columns, dtype)
        rounded = columns.values_of(steps)
        gradient = linear.descend(rounded, columns)
    losses = (gradient * (rounded - linear.values)).sum(dim=0)
    integers = torch.empty_like(rounded)
    integers[linear.order] = columns.steps_of(rounded) - columns.low[columns.group]
    stored = [values.T.contiguous() for values in (integers, columns.scale, -columns.low)]
    return GptqRounding(
        QuantizedWeight(stored[0].to(torch.uint8), stored[1], stored[2].to(torch.uint8), scheme),
        losses,
        linear.damping,
    )


def blocks(count: int) -> Iterator[slice]:
    """Runs of columns."""
    return (slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


@dataclass(frozen=True)
class OrderedLinear:
    """A linear and the second moment of its input, the columns in the order in which they are rounded.

    Matrices of weights are transposed, (C, rows): all work goes column by column.
    """

    values: Tensor  # the weights; zero where nothing was seen
    order: Tensor  # (C,): the columns' numbers in the file
    moment: Tensor  # H, with 1 on the diagonal where nothing was seen
    factor: Tensor
    damping: float

    @classmethod
    def of(cls, weight: Tensor, moment: Tensor) -> OrderedLinear:
        diagonal = moment.diagonal()
        order = diagonal.argsort(descending=True, stable=True)
        dead = (diagonal <= 0)[order]
        ordered = moment[order][:, order]
        ordered.diagonal()[dead] = 1.0
        values = weight.T[order].contiguous()
        values[dead] = 0.0  # never read: any value will do, zero is the cheapest
        return cls(values, order, ordered, *inverse_factor(ordered))

    def columns(self, grid: Grid) -> ColumnGrid:
        """The grid of every column."""
        scale, zero = (values.squeeze(-1).T.contiguous() for values in (grid.scale, grid.zero))
        return ColumnGrid(scale, -zero, self.order // (len(self.order) // len(scale)), 2**grid.bits - 1)

    def started(self, grids: Sequence[ColumnGrid]) -> tuple[Tensor, ColumnGrid]:
        """GPTQ on all grids; of each row the best outcome, and its grid."""
        columns = grids[0]
        rounded, least = self.spread_errors(columns)
        for grid in grids[1:]:
            other, losses = self.spread_errors(grid)
            better = losses < least
            rounded, least = torch.where(better, other, rounded), torch.minimum(losses, least)
            scale, low = (
                torch.where(better, new, old)
                for new, old in ((grid.scale, columns.scale), (grid.low, columns.low))
            )
            columns = replace(columns, scale=scale, low=low)
        return rounded, columns

    def spread_errors(self, columns: ColumnGrid) -> tuple[Tensor, Tensor]:
        """The rounded matrix, and the loss of each row by the damped H."""
        values, rounded = self.values.clone(), torch.empty_like(self.values)
        diagonal, losses = self.factor.diagonal()[:, None], self.values.new_zeros(self.values.shape[1])
        for block in blocks(len(values)):
            rows = self.factor[block] / diagonal[block]
            rounded[block], change = round_columns(values[block], -rows[:, block], columns.of(block))
            values[block.stop :].addmm_(rows[:, block.stop :].T, change, alpha=-1)
            losses += (change / diagonal[block]).square_().sum(dim=0)
        return rounded, losses

    def descend(self, rounded: Tensor, columns: ColumnGrid) -> Tensor:
        """Coordinate descent on `tr(E H E^T)`, E = rounded - values, in place; H E at its end."""
        gradient = self.moment @ (rounded - self.values)
        diagonal = self.moment.diagonal().clamp(min=1e-30)
        for _ in range(SWEEPS):
            for block in blocks(len(rounded)):
                target = rounded[block] - gradient[block] / diagonal[block, None]
                coefficients = -self.moment[block, block] / diagonal[block]
                rounded[block], change = round_columns(
                    target, coefficients, columns.of(block), rounded[block]
                )
                gradient.addmm_(self.moment[:, block], change)
        return gradient

    def fitted(self, steps: Tensor, gradient: Tensor, columns: ColumnGrid, dtype: torch.dtype) -> ColumnGrid:
        """The grids with the scales that suit these steps from zero best, for the rows whose loss they lower.

        A row's loss is quadratic in the scales of its groups: a change d of them adds `d A d + 2 d r`, with
        A_gh = v_g H_gh v_h of the steps v and r_g = v_g (H e)_g of the error e. The best scales are rounded
        to what files hold.
        """
        groups, rows = columns.scale.shape
        by_group = columns.group.argsort(stable=True)
        slope = (steps * gradient)[by_group].view(groups, -1, rows).sum(dim=1)
        matrix = self.normal_matrix(steps[by_group], by_group, groups)
        scale = columns.scale.clone()
        chunk = max(1, FIT_VALUES // groups**2)
        for start in range(0, rows, chunk):
            some = slice(start, start + chunk)
            before, r, a = columns.scale[:, some].T, slope[:, some].T, matrix[:, :, some].permute(2, 0, 1)
            ratio = (before - solution(a, r)) / before
            within = (ratio > FIT_RANGE[0]) & (ratio < FIT_RANGE[1])
            after = stored_scale(torch.where(within, ratio * before, before), dtype)
            change = after - before
            gain = ((a @ change[..., None]).squeeze(-1) + 2 * r).mul_(change).sum(dim=1)
            scale[:, some] = torch.where(gain[:, None] < 0, after, before).T
        return replace(columns, scale=scale)

    def normal_matrix(self, steps: Tensor, by_group: Tensor, groups: int) -> Tensor:
        """A of `fitted`, (groups, groups, rows), of steps that lie group by group."""
        size, rows = len(steps) // groups, steps.shape[1]
        moment = self.moment[by_group][:, by_group]
        matrix = steps.new_empty(groups, groups, rows)
        for group, start in enumerate(range(0, len(steps), size)):
            columns = slice(start, start + size)
            product = (moment[start:, columns] @ steps[columns]).mul_(steps[start:])
            sums = product.view(-1, size, rows).sum(dim=1)
            matrix[group, group:] = matrix[group:, group] = sums
        return matrix


def solution(matrix: Tensor, right: Tensor) -> Tensor:
    """(rows, groups): of the normal equations; NaN or infinite where there is none."""
    damped = matrix.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(dim=1, keepdim=True) + 1e-30  # groups of zeros have no scale
    values: Tensor = torch.linalg.solve_ex(damped, right[..., None])[0].squeeze(-1)
    return values


def inverse_factor(moment: Tensor) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the inverse of the damped H, and the damping that it took."""
    damping = DAMPING
    mean = moment.diagonal().mean()
    while damping <= MAX_DAMPING:
        damped = moment.clone()
        damped.diagonal().add_(damping * mean)
        # From the last row to the first H is U U^T with an upper U, and its inverse is U^-T U^-1.
        inverse, failed = inverse_lower(damped.flip(0, 1))
        if not bool(failed) and bool(torch.isfinite(inverse).all()):
            return inverse.flip(0, 1).contiguous(), damping
        damping *= 2
    raise RecipeUnsupported(
        "the second moment of a linear's input is not positive definite",
        code="moment_singular",
        remedy="use more calibration text, or method awq or rtn with rounding nearest",
    )
