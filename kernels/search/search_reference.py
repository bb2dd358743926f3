"""The slow, obvious truth of the search's operators: loops over rows and candidates, errors in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.search.grids import GridRule


def rounding_error(values: Tensor, low: Tensor, high: Tensor, rule: GridRule) -> tuple[Tensor, Tensor]:
    """The error of rounding `values` (g,) on the grid of one range, and (scale, zero point)."""
    scale, zero = rule.fit(low, high)
    steps = torch.round(values.double() / scale.double()) + zero.double()
    return (steps.clamp(0, rule.steps) - zero.double()) * scale.double() - values.double(), torch.stack(
        [scale, zero]
    )


def rounding_errors(
    weight: Tensor, scales: Tensor, rule: GridRule, group_size: int, range_factor: float
) -> Tensor:
    """float64 (candidates, rows, C)."""
    size = weight.shape[1] if group_size == -1 else group_size
    errors = torch.empty(scales.shape[0], *weight.shape, dtype=torch.float64)
    for candidate, scale in enumerate(scales):
        for row, values in enumerate(weight * scale):
            for start in range(0, len(values), size):
                group = slice(start, start + size)
                low, high = values[group].min() * range_factor, values[group].max() * range_factor
                error, _ = rounding_error(values[group], low, high, rule)
                errors[candidate, row, group] = error / scale[group].double()
    return errors


def clip_step(
    weight: Tensor,
    block: Tensor,
    others: Tensor,
    start: Tensor,
    joint: Sequence[float],
    side: Sequence[float],
    rule: GridRule,
) -> tuple[Tensor, Tensor]:
    """The errors, float64 (rows, g), and the losses (rows,) of the best ranges.

    start: (2, rows), the factors of both bounds that each row starts from.
    """
    errors = torch.empty(weight.shape, dtype=torch.float64)
    losses = torch.empty(len(weight), dtype=torch.float64)
    for row, values in enumerate(weight):
        low, high = values.min().clamp(max=0.0), values.max().clamp(min=0.0)

        def judged(factors: Tensor, row: int = row) -> tuple[float, Tensor]:
            error, _ = rounding_error(weight[row], low * factors[0], high * factors[1], rule)  # noqa: B023
            return float(error @ block.double() @ error + 2 * error @ others[row].double()), error

        best = start[:, row].clone()
        loss, error = judged(best)
        moves = [[(f, f) for f in joint]]
        moves += (
            [[(f, f) for f in side]] if rule.symmetric else [[(f, 1) for f in side], [(1, f) for f in side]]
        )
        for stage in moves:
            base = best.clone()
            for move in stage:
                factors = base * torch.tensor(move, dtype=torch.float32)
                candidate_loss, moved = judged(factors)
                if candidate_loss < loss:
                    best, loss, error = factors, candidate_loss, moved
        errors[row], losses[row] = error, loss
    return errors, losses
