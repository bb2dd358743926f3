"""Evolutionary search: scale exponents and clip together, on the objective of the grid search.

A candidate is (a, b, f): scales xm^a / wm^b, and f of each group's range. The grid only has b = 0 or
b = 1 - a, and f = 1. Differential evolution (Storn and Price 1997, SciPy's implementation) starts around
the grid's choice, with a seed and a budget in evaluations. The outcome and the grid's choice are compared
as they will be rounded, after the clip search of every group if the recipe has one, so the grid's choice
stays unless something is truly better. Without clip, f is 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import differential_evolution
from torch import Tensor

from app.core.records.specs import SearchSpec
from workers.quantization.clip_search import search_clip
from workers.quantization.input_statistics import InputStatistics
from workers.quantization.scale_search import (
    SAMPLED_ROWS,
    Fold,
    ScaleChoice,
    ScaledLinear,
    normalised,
    ranking_dtype,
    rounding_losses,
    sampled,
    weight_means,
)

BOUNDS = ((0.0, 1.2), (0.0, 1.0), (0.5, 1.0))  # of a, b and f
POPULATION = 12


@dataclass(frozen=True)
class Objective:
    """The loss of a candidate on a sample of rows."""

    linears: list[ScaledLinear]
    log_x: Tensor  # of the channel means, shared as the fold demands; 0 for dead channels
    log_w: Tensor
    alive: Tensor
    moment: Tensor
    fold: Fold
    clip: bool

    @classmethod
    def of(
        cls, linears: list[ScaledLinear], statistics: InputStatistics, fold: Fold, *, clip: bool
    ) -> Objective:
        x_mean, w_mean = fold.shared(statistics.abs_mean), fold.shared(weight_means(linears))
        alive = (x_mean > 0) & (w_mean > 0)
        moment = statistics.moment
        return cls(
            sampled(linears, SAMPLED_ROWS),
            torch.where(alive, x_mean, 1.0).log() * statistics.confidence,
            torch.where(alive, w_mean, 1.0).log() * statistics.confidence,
            alive,
            moment.to(ranking_dtype(moment.device)),
            fold,
            clip,
        )

    def scales(self, a: float, b: float) -> Tensor:
        raw = normalised(a * self.log_x - b * self.log_w, self.alive)
        return self.fold.representable(raw)

    def __call__(self, candidate: NDArray[np.float64]) -> float:
        a, b, f = (float(value) for value in candidate)
        scales = self.scales(a, b)
        if not bool(self.fold.fits(scales)):
            return 1e30
        spread = self.fold.spread(scales)
        factor = f if self.clip else 1.0
        losses = rounding_losses(
            self.linears, spread[None], self.moment, self.fold.dtype, range_factor=factor
        )
        loss = float(losses)
        return loss if np.isfinite(loss) else 1e30


def evolve_scales(
    linears: list[ScaledLinear],
    statistics: InputStatistics,
    fold: Fold,
    search: SearchSpec,
    start: ScaleChoice,
) -> ScaleChoice:
    """The better of `start` and what evolution finds from it, both judged as they will be rounded."""
    objective = Objective.of(linears, statistics, fold, clip=search.clip)
    best = evolved_candidate(objective, start, search)
    evolved = fold.spread(objective.scales(float(best[0]), float(best[1])))
    judged = clipped_loss if search.clip else unclipped_loss
    before, after = (judged(linears, scales, statistics.moment, fold) for scales in (start.scales, evolved))
    if not after < before:
        return start
    loss = unclipped_loss(linears, evolved, statistics.moment, fold)
    return replace(start, scales=evolved, ratio=float(best[0]), weight_ratio=float(best[1]), loss=loss)


def evolved_candidate(objective: Objective, start: ScaleChoice, search: SearchSpec) -> NDArray[np.float64]:
    """(a, b, f) after at most `search.budget` evaluations."""
    center = np.array([start.ratio, start.weight_ratio, 0.95])
    generator = np.random.default_rng(search.seed)
    low, high = np.array(BOUNDS).T
    population = np.clip(center + generator.normal(0, 0.15, (POPULATION, len(BOUNDS))), low, high)
    population[0] = [start.ratio, start.weight_ratio, 1.0]
    outcome = differential_evolution(
        objective,
        BOUNDS,
        init=population,
        maxiter=max(0, search.budget // POPULATION - 1),
        tol=1e-4,
        polish=False,
        rng=generator,
    )
    best: NDArray[np.float64] = outcome.x
    return best


def unclipped_loss(linears: list[ScaledLinear], scales: Tensor, moment: Tensor, fold: Fold) -> float:
    """The group's loss on the full ranges."""
    return float(rounding_losses(linears, scales[None], moment, fold.dtype))


def clipped_loss(linears: list[ScaledLinear], scales: Tensor, moment: Tensor, fold: Fold) -> float:
    """The group's loss after the clip search."""
    folded = moment / torch.outer(scales, scales)
    losses = [
        search_clip(linear.weight * scales, folded, linear.scheme, fold.dtype)[2].sum() for linear in linears
    ]
    return float(torch.stack(losses).sum())
