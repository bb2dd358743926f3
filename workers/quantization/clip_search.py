"""Clip search: a smaller range per group where that lowers the output error.

For a row w of a linear and a range shrunk to [low * a, high * b] in one group, the row's expected squared
error is e H e^T over all groups. Groups are visited in turn; the error of the other groups enters through
the cross terms of H, so each choice lowers the true loss of its row, and the full range is always a choice.
A second visit corrects choices that were made before later groups were decided. Bounds are asymmetric on
asymmetric grids (a symmetric clamp ruins 2 and 3 bits).
"""

from __future__ import annotations

import torch
from torch import Tensor

from app.core.format_limits import Scheme
from workers.quantization.grid import Grid, fit_grid, grouped_view, min_max_grid

JOINT_FACTORS = tuple(1 - 0.05 * step for step in range(13))  # of the whole range: 1 down to 0.4
SIDE_FACTORS = (1.1, 1.05, 0.95, 0.9, 0.85, 0.8)  # then of one bound, relative to the best so far
FINE_FACTORS = (1.1, 1.05, 1.025, 0.975, 0.95, 0.9)  # on the second visit


def search_clip(
    weight: Tensor, moment: Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[Grid, Tensor, Tensor]:
    """The grid of the best ranges, and the loss per row before and after.

    weight: (rows, C) float32; moment: (C, C) float32; losses: (rows,) float32.
    """
    grouped = grouped_view(weight, scheme)
    grid = min_max_grid(grouped, scheme, dtype)
    error = grid.nearest(grouped) - grouped
    flat = error.view_as(weight)  # shares memory: a group's new error is seen by the next group
    before = ((flat @ moment) * flat).sum(dim=1)
    size = grouped.shape[2]
    searches = []
    for visit in range(2):
        for index in range(grouped.shape[1]):
            columns = slice(index * size, (index + 1) * size)
            block = moment[columns, columns]
            others = flat @ moment[:, columns] - error[:, index] @ block
            if visit == 0:
                searches.append(GroupSearch(grouped[:, index], block, scheme, dtype))
                error[:, index] = searches[index].first_visit(others)
            else:
                error[:, index] = searches[index].second_visit(others)
    after = ((flat @ moment) * flat).sum(dim=1)
    grids = [search.grid() for search in searches]
    scale, zero = (torch.stack(parts, dim=1) for parts in zip(*grids, strict=True))
    return Grid(scale, zero, scheme.bits), before, after


class GroupSearch:
    """The best range of one group for every row.

    weight: (rows, group_size); block: (group_size, group_size) of H. `others`, where a method takes it, is
    (rows, group_size): the error of all other groups times their cross block of H.
    """

    def __init__(self, weight: Tensor, block: Tensor, scheme: Scheme, dtype: torch.dtype) -> None:
        self.weight, self.block, self.scheme, self.dtype = weight, block, scheme, dtype
        low, high = weight.aminmax(dim=1, keepdim=True)
        self.low, self.high = low.clamp(max=0.0), high.clamp(min=0.0)
        self.low_factor = torch.ones_like(self.low)
        self.high_factor = torch.ones_like(self.low)

    def first_visit(self, others: Tensor) -> Tensor:
        """Shrink the whole range, then each bound; the error of the best range: (rows, group_size)."""
        whole = self.low_factor
        loss = self.loss(whole, whole, others)
        for factor in JOINT_FACTORS[1:]:
            loss = self.keep_better(loss, whole * factor, whole * factor, others)
        return self.refine(loss, SIDE_FACTORS, others)

    def second_visit(self, others: Tensor) -> Tensor:
        """Move each bound a little, now that all other groups have their range."""
        return self.refine(self.loss(self.low_factor, self.high_factor, others), FINE_FACTORS, others)

    def refine(self, loss: Tensor, factors: tuple[float, ...], others: Tensor) -> Tensor:
        low, high = self.low_factor, self.high_factor
        if self.scheme.symmetric:
            for factor in factors:
                loss = self.keep_better(loss, low * factor, high * factor, others)
            return self.error(self.low_factor, self.high_factor)
        for factor in factors:
            loss = self.keep_better(loss, low * factor, high, others)
        low = self.low_factor
        for factor in factors:
            loss = self.keep_better(loss, low, high * factor, others)
        return self.error(self.low_factor, self.high_factor)

    def range_grid(self, low_factor: Tensor, high_factor: Tensor) -> Grid:
        return fit_grid(self.low * low_factor, self.high * high_factor, self.scheme, self.dtype)

    def error(self, low_factor: Tensor, high_factor: Tensor) -> Tensor:
        return self.range_grid(low_factor, high_factor).nearest(self.weight) - self.weight

    def loss(self, low_factor: Tensor, high_factor: Tensor, others: Tensor) -> Tensor:
        """(rows, 1): the part of the row's loss that this group's error decides."""
        error = self.error(low_factor, high_factor)
        return ((error @ self.block + 2 * others) * error).sum(dim=1, keepdim=True)

    def keep_better(self, best: Tensor, low_factor: Tensor, high_factor: Tensor, others: Tensor) -> Tensor:
        """Take the factors for the rows where they lower the loss; the lower loss per row."""
        loss = self.loss(low_factor, high_factor, others)
        better = loss < best
        self.low_factor = torch.where(better, low_factor, self.low_factor)
        self.high_factor = torch.where(better, high_factor, self.high_factor)
        return torch.where(better, loss, best)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the best range, (rows, 1) each."""
        best = self.range_grid(self.low_factor, self.high_factor)
        return best.scale, best.zero
