"""Evolutionary search: never behind the grid, seeded, within its budget."""

from __future__ import annotations

import pytest
import torch

from app.core.formats.file_format import Scheme
from app.core.records.specs import SearchSpec
from workers.quantization.evolution import Objective, clipped_loss, evolve_scales, unclipped_loss
from workers.quantization.input_statistics import InputCollector, InputStatistics
from workers.quantization.scale_search import Fold, ScaledLinear, search_scales

CHANNELS = 64
FOLD = Fold(torch.ones(CHANNELS), is_norm=True, head_shape=None, dtype=torch.bfloat16)


def statistics_with_outliers(seed: int) -> InputStatistics:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, CHANNELS, generator=generator)
    x[:, ::9] *= 12
    collector = InputCollector()
    collector.add(x)
    return collector.result("x")


def linears(bits: int) -> list[ScaledLinear]:
    generator = torch.Generator().manual_seed(3)
    scheme = Scheme(bits=bits, group_size=32, symmetric=False)
    return [ScaledLinear.of(torch.randn(rows, CHANNELS, generator=generator), scheme) for rows in (24, 16)]


def spec(**changes: object) -> SearchSpec:
    return SearchSpec.model_validate({"strategy": "evolutionary", "grid_points": 3, "budget": 48, **changes})


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("clip", [True, False])
def test_it_is_never_behind_the_grid_it_starts_from(bits: int, seed: int, clip: bool) -> None:
    statistics, group = statistics_with_outliers(seed), linears(bits)
    grid = search_scales(group, statistics, FOLD, spec(clip=clip))
    found = evolve_scales(group, statistics, FOLD, spec(seed=seed, clip=clip), grid)
    loss = clipped_loss if clip else unclipped_loss
    before = loss(group, grid.scales, statistics.moment, FOLD)
    after = loss(group, found.scales, statistics.moment, FOLD)
    assert after <= before


def test_it_improves_on_a_coarse_grid() -> None:
    statistics, group = statistics_with_outliers(0), linears(3)
    grid = search_scales(group, statistics, FOLD, spec(grid_points=2))
    found = evolve_scales(group, statistics, FOLD, spec(grid_points=2, budget=96), grid)
    before = clipped_loss(group, grid.scales, statistics.moment, FOLD)
    assert clipped_loss(group, found.scales, statistics.moment, FOLD) < before


def test_a_seed_decides_the_outcome() -> None:
    statistics, group = statistics_with_outliers(0), linears(3)
    grid = search_scales(group, statistics, FOLD, spec())
    runs = [evolve_scales(group, statistics, FOLD, spec(seed=seed), grid) for seed in (5, 5)]
    assert torch.equal(runs[0].scales, runs[1].scales)


def test_the_budget_bounds_the_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    plain = Objective.__call__

    def counted(self: Objective, candidate: object) -> float:
        nonlocal calls
        calls += 1
        return plain(self, candidate)  # type: ignore[arg-type]

    monkeypatch.setattr(Objective, "__call__", counted)
    statistics, group = statistics_with_outliers(0), linears(4)
    grid = search_scales(group, statistics, FOLD, spec())
    evolve_scales(group, statistics, FOLD, spec(budget=60), grid)
    assert 12 <= calls <= 60
