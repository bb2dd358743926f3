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

from app.core.formats.file_format import Scheme
from kernels.search.losses import quick_row_losses
from kernels.search.search_operators import clip_visit
from workers.quantization.grid import Grid, grouped_view, min_max_grid

# The share of a group's weights that a range may leave out, by bits, before the bounds are moved one by one.
# Ranges that leave out more fit the calibration text and lose on other text, most of all at 2 bits.
OUTSIDE = {2: 0.08, 3: 0.06, 4: 0.05, 8: 0.01}
SAMPLED_WEIGHTS = 2**18  # that percentiles are taken from
STEP = 0.05  # of the whole range
LOWEST = 0.3  # share of a range, whatever the weights are
SIDE_FACTORS = (1.1, 1.05, 0.95, 0.9, 0.85, 0.8)  # then of one bound, relative to the best so far
FINE_FACTORS = (1.1, 1.05, 1.025, 0.975, 0.95, 0.9)  # on the second visit


def search_clip(
    weight: Tensor, moment: Tensor, scheme: Scheme, dtype: torch.dtype, smallest: float | None = None
) -> tuple[Grid, Tensor, Tensor]:
    """The grid of the best ranges, and the loss per row before and after.

    weight: (rows, C) float32; moment: (C, C) float32; smallest: the weight's `smallest_factor`, if it is at
    hand; losses: (rows,) float32.
    """
    weight, moment = weight.contiguous(), moment.contiguous()
    grouped = grouped_view(weight, scheme)
    plain = min_max_grid(grouped, scheme, dtype)
    error = plain.nearest(grouped).sub_(grouped).view_as(weight)
    before = quick_row_losses(error, moment)
    ranges = weight.new_ones(grouped.shape[1], 4, grouped.shape[0])  # see clip_step
    if smallest is None:
        smallest = smallest_factor(weight, scheme)
    whole = joint_factors(smallest)  # percentiles of the weights bound the search
    for joint, side in ((whole, SIDE_FACTORS), ((), FINE_FACTORS)):
        clip_visit(weight, moment, error, ranges, joint, side, scheme.bits, scheme.symmetric, dtype)
    scale, zero = ranges[:, 2:].permute(1, 2, 0).contiguous()[..., None]
    after = quick_row_losses(error, moment)
    # The groups' losses are known to some digits only: a row that gained nothing may have lost as little.
    worse = after > before
    scale = torch.where(worse[:, None, None], plain.scale, scale)
    zero = torch.where(worse[:, None, None], plain.zero, zero)
    return Grid(scale, zero, scheme.bits), before, torch.minimum(before, after)


def smallest_factor(weight: Tensor, scheme: Scheme) -> float:
    """The smallest share of a range that is tried: a percentile of the weights' sizes in the median group."""
    sample = weight[:: max(1, weight.numel() // SAMPLED_WEIGHTS)]
    size = grouped_view(sample, scheme).abs().flatten(0, 1)
    inside = max(1, round((1 - OUTSIDE[scheme.bits]) * size.shape[1]))
    shares = size.kthvalue(inside, dim=1).values / size.amax(dim=1).clamp(min=1e-30)
    return float(shares.median())


def joint_factors(smallest: float) -> tuple[float, ...]:
    """Shares of the whole range from below 1 to the smallest."""
    return tuple(1 - STEP * step for step in range(1, int((1 - max(smallest, LOWEST)) / STEP + 1e-6) + 1))
