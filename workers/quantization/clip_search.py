"""Clip search: a smaller range per group where that lowers the output error.

For a row w of a linear and a range shrunk to [low * a, high * b] in one group, the row's expected squared
error is e H e^T over all groups. Groups are visited in turn; the error of the groups already decided
enters through the cross terms of H, so each choice lowers the true loss of its row, and the full range is
always a choice. Bounds are asymmetric on asymmetric grids (a symmetric clamp ruins 2 and 3 bits).
"""

from __future__ import annotations

import torch
from torch import Tensor

from app.core.format_limits import Scheme
from workers.quantization.grid import Grid, fit_grid, grouped_view, min_max_grid

JOINT_FACTORS = tuple(1 - 0.05 * step for step in range(13))  # of the whole range: 1 down to 0.4
SIDE_FACTORS = (1.1, 1.05, 0.95, 0.9, 0.85, 0.8)  # then of one bound, relative to the best so far


def search_clip(
    weight: Tensor, moment: Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[Grid, Tensor, Tensor]:
    """The grid of the best ranges, and the loss per row before and after.

    weight: (rows, C) float32; moment: (C, C) float32; losses: (rows,) float32.
    """
    grouped = grouped_view(weight, scheme)
    grid = min_max_grid(grouped, scheme, dtype)
    error = grid.nearest(grouped) - grouped
    flat = error.view_as(weight)
    before = ((flat @ moment) * flat).sum(dim=1)
    scale, zero = grid.scale.clone(), grid.zero.clone()
    size = grouped.shape[2]
    for index in range(grouped.shape[1]):
        columns = slice(index * size, (index + 1) * size)
        block = moment[columns, columns]
        others = flat @ moment[:, columns] - error[:, index] @ block
        search = GroupSearch(grouped[:, index], block, others, scheme, dtype)
        scale[:, index], zero[:, index] = search.run()
        best = Grid(scale[:, index], zero[:, index], scheme.bits)
        error[:, index] = best.nearest(grouped[:, index]) - grouped[:, index]
    after = ((flat @ moment) * flat).sum(dim=1)
    return Grid(scale, zero, scheme.bits), before, after


class GroupSearch:
    """The best range of one group for every row.

    weight: (rows, group_size); block: (group_size, group_size) of H; others: (rows, group_size), the error
    of all other groups times their cross block of H.
    """

    def __init__(
        self, weight: Tensor, block: Tensor, others: Tensor, scheme: Scheme, dtype: torch.dtype
    ) -> None:
        self.weight, self.block, self.others = weight, block, others
        self.scheme, self.dtype = scheme, dtype
        low, high = weight.aminmax(dim=1, keepdim=True)
        self.low, self.high = low.clamp(max=0.0), high.clamp(min=0.0)
        self.loss = torch.full((weight.shape[0], 1), torch.inf, device=weight.device)
        self.low_factor = torch.ones_like(self.loss)
        self.high_factor = torch.ones_like(self.loss)

    def try_factors(self, low_factor: Tensor, high_factor: Tensor) -> None:
        """Keep the factors for the rows where they lower the loss."""
        grid = fit_grid(self.low * low_factor, self.high * high_factor, self.scheme, self.dtype)
        error = grid.nearest(self.weight) - self.weight
        loss = ((error @ self.block + 2 * self.others) * error).sum(dim=1, keepdim=True)
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        self.low_factor = torch.where(better, low_factor, self.low_factor)
        self.high_factor = torch.where(better, high_factor, self.high_factor)

    def run(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the best range: (rows, 1) each."""
        whole = torch.ones_like(self.loss)
        for factor in JOINT_FACTORS:
            self.try_factors(whole * factor, whole * factor)
        if not self.scheme.symmetric:
            low, high = self.low_factor, self.high_factor
            for factor in SIDE_FACTORS:
                self.try_factors(low * factor, high)
            low = self.low_factor
            for factor in SIDE_FACTORS:
                self.try_factors(low, high * factor)
        grid = fit_grid(self.low * self.low_factor, self.high * self.high_factor, self.scheme, self.dtype)
        return grid.scale, grid.zero
