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
from kernels.search.operators import clip_step
from workers.quantization.grid import Grid, grouped_view, min_max_grid
from workers.quantization.losses import matrix_units, row_losses

JOINT_FACTORS = tuple(1 - 0.05 * step for step in range(1, 13))  # of the whole range: down to 0.4
SIDE_FACTORS = (1.1, 1.05, 0.95, 0.9, 0.85, 0.8)  # then of one bound, relative to the best so far
FINE_FACTORS = (1.1, 1.05, 1.025, 0.975, 0.95, 0.9)  # on the second visit
VISITS = ((JOINT_FACTORS, SIDE_FACTORS), ((), FINE_FACTORS))


def search_clip(
    weight: Tensor, moment: Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[Grid, Tensor, Tensor]:
    """The grid of the best ranges, and the loss per row before and after.

    weight: (rows, C) float32; moment: (C, C) float32; losses: (rows,) float32.
    """
    grouped = grouped_view(weight, scheme)
    rows, groups, size = grouped.shape
    error = min_max_grid(grouped, scheme, dtype).nearest(grouped).sub_(grouped)
    flat = error.view_as(weight)  # shares memory: a group's new error is seen by the next group
    before = row_losses(flat, moment)
    ranges = weight.new_ones(groups, 4, rows)  # per group: see clip_step
    for joint, side in VISITS:
        for index in range(groups):
            columns = slice(index * size, (index + 1) * size)
            flat[:, columns] = 0.0
            with matrix_units(weight.device):
                others = flat @ moment[:, columns]
            clip_step(
                grouped[:, index], moment[columns, columns], others, error[:, index], ranges[index],
                joint, side, scheme.bits, scheme.symmetric, dtype,
            )  # fmt: skip
    scale, zero = ranges[:, 2:].permute(1, 2, 0).contiguous()[..., None]
    return Grid(scale, zero, scheme.bits), before, row_losses(flat, moment)
