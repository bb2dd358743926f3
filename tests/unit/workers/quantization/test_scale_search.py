"""Scale search: its candidates, its guards, and that it never loses to plain rounding."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.core.formats.file_format import Scheme
from app.core.records.specs import SearchSpec
from kernels.cpu.native_library import TILES_NEED
from kernels.search import cpu
from workers.quantization.grid import grouped_view, min_max_grid
from workers.quantization.input_statistics import InputCollector, InputStatistics
from workers.quantization.scale_search import (
    FLOAT16_LIMIT,
    MAX_SPREAD,
    Fold,
    ScaledLinear,
    candidates,
    exponents,
    grid_scales,
    normalised,
    ranking_dtype,
    search_scales,
)

CHANNELS = 64
SCHEME = Scheme(bits=3, group_size=32, symmetric=False)
SEARCH = SearchSpec(grid_points=6)


def statistics_of(x: Tensor) -> InputStatistics:
    collector = InputCollector()
    collector.add(x)
    return collector.result("x")


def outlier_inputs(seed: int = 0, *, every: int = 8, factor: float = 16.0) -> Tensor:
    x = torch.randn(300, CHANNELS, generator=torch.Generator().manual_seed(seed))
    x[:, ::every] *= factor
    return x


def linears(seed: int = 1, scheme: Scheme = SCHEME, count: int = 2) -> list[ScaledLinear]:
    generator = torch.Generator().manual_seed(seed)
    return [ScaledLinear.of(torch.randn(16, CHANNELS, generator=generator), scheme) for _ in range(count)]


def norm_fold(dtype: torch.dtype = torch.float32, weight: Tensor | None = None) -> Fold:
    if weight is None:
        weight = 1 + 0.3 * torch.rand(CHANNELS, generator=torch.Generator().manual_seed(2))
    return Fold(weight.to(dtype).float(), is_norm=True, head_shape=None, dtype=dtype)


def output_loss(group: list[ScaledLinear], scales: Tensor, x: Tensor, dtype: torch.dtype) -> float:
    """Mean squared error of the group's outputs, measured with the inputs themselves, in float64."""
    total = 0.0
    for linear in group:
        scaled = grouped_view(linear.weight * scales, linear.scheme)
        rounded = min_max_grid(scaled, linear.scheme, dtype).nearest(scaled).view_as(linear.weight)
        error = rounded.double() / scales.double() - linear.weight.double()
        total += float((x.double() @ error.T).square().sum() / len(x))
    return total


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_losses_are_measured_output_errors(bits: int, *, symmetric: bool) -> None:
    x = outlier_inputs()
    group = linears(scheme=Scheme(bits=bits, group_size=32, symmetric=symmetric))
    choice = search_scales(group, statistics_of(x), norm_fold(), SEARCH)
    identity = torch.ones(CHANNELS)
    assert choice.loss_identity == pytest.approx(output_loss(group, identity, x, torch.float32), rel=1e-3)
    assert choice.loss == pytest.approx(output_loss(group, choice.scales, x, torch.float32), rel=1e-3)
    assert choice.loss < 0.75 * choice.loss_identity


@given(st.integers(0, 10**6), st.sampled_from([True, False, "both"]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_loss_is_never_above_plain_rounding(
    seed: int, duo: Literal["both"] | bool, symmetric: bool
) -> None:
    scheme = Scheme(bits=4, group_size=32, symmetric=symmetric)
    x = torch.randn(80, CHANNELS, generator=torch.Generator().manual_seed(seed))
    search = SearchSpec(grid_points=3, duo_scaling=duo)
    choice = search_scales(linears(seed, scheme), statistics_of(x), norm_fold(torch.bfloat16), search)
    assert choice.loss <= choice.loss_identity


@pytest.mark.parametrize(
    ("duo", "expected"),
    [
        (False, [(0.5, 0.0), (1.0, 0.0)]),
        (True, [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]),
        ("both", [(0.5, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]),
    ],
)
def test_candidates_without_and_with_duo_scaling(
    duo: Literal["both"] | bool, expected: list[tuple[float, float]]
) -> None:
    search = SearchSpec(grid_points=2, duo_scaling=duo)
    fold = Fold(torch.ones(CHANNELS, 1), is_norm=False, head_shape=None, dtype=torch.float32)
    tried = candidates(linears(), statistics_of(outlier_inputs()), fold, search)
    assert exponents(search) == expected
    assert tried.ratios == [(0.0, 0.0), *expected]
    assert torch.equal(tried.scales[0], torch.ones(CHANNELS))


def test_candidates_follow_the_formula_of_awq() -> None:
    x_mean, w_mean = torch.rand(8) + 0.1, torch.rand(8) + 0.1
    grid = exponents(SearchSpec(grid_points=4))
    for (ratio, weight_ratio), scales in zip(grid, grid_scales(grid, x_mean, w_mean), strict=True):
        raw = x_mean**ratio / w_mean**weight_ratio
        torch.testing.assert_close(scales, raw / (raw.max() * raw.min()).sqrt(), rtol=1e-5, atol=0)


def test_the_spread_of_scales_is_bounded() -> None:
    logs = torch.tensor([-200.0, 0.0, 1.0, 200.0])
    scales = normalised(logs, torch.ones(4, dtype=torch.bool))
    assert bool(torch.isfinite(scales).all())
    assert float(scales.max() / scales.min()) == pytest.approx(MAX_SPREAD, rel=1e-4)
    assert float(scales.max() * scales.min()) == pytest.approx(1, rel=1e-4)


def test_dead_channels_keep_scale_one_and_do_not_stretch_the_others() -> None:
    x = outlier_inputs()
    dead = [3, 17, 40]
    x[:, dead] = 0
    group = linears()
    for linear in group:
        linear.weight[:, 50] = 0
    fold = Fold(torch.ones(CHANNELS, 1), is_norm=False, head_shape=None, dtype=torch.float32)
    choice = search_scales(group, statistics_of(x), fold, SEARCH)
    assert choice.ratio > 0
    assert choice.scales[[*dead, 50]].tolist() == [1.0] * 4
    alive = torch.ones(CHANNELS, dtype=torch.bool)
    alive[[*dead, 50]] = False
    assert 2 < float(choice.scales[alive].max() / choice.scales[alive].min()) < 1000


def test_without_any_input_the_identity_is_chosen() -> None:
    choice = search_scales(linears(), statistics_of(torch.zeros(10, CHANNELS)), norm_fold(), SEARCH)
    assert torch.equal(choice.scales, torch.ones(CHANNELS))
    assert (choice.loss, choice.loss_identity) == (0.0, 0.0)


@pytest.mark.parametrize("is_norm", [True, False])
def test_candidates_that_overflow_float16_are_dropped(*, is_norm: bool) -> None:
    """Scales under 1 on a large predecessor would lift it over the limit: the identity is left."""
    weight = torch.full((CHANNELS,) if is_norm else (CHANNELS, 3), 0.999 * FLOAT16_LIMIT)
    fold = Fold(weight, is_norm=is_norm, head_shape=None, dtype=torch.float32)
    choice = search_scales(linears(), statistics_of(outlier_inputs()), fold, SEARCH)
    assert torch.equal(choice.scales, torch.ones(CHANNELS))
    assert math.isfinite(choice.loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_of_a_norm_leave_weights_that_its_dtype_holds(dtype: torch.dtype) -> None:
    fold = norm_fold(dtype)
    choice = search_scales(linears(), statistics_of(outlier_inputs()), fold, SEARCH)
    assert float(choice.scales.max() / choice.scales.min()) > 2
    folded = fold.smooth_weight / choice.scales
    stored = folded.to(dtype).float()
    torch.testing.assert_close(stored * choice.scales, fold.smooth_weight, rtol=1e-6, atol=0)


def test_channels_that_a_norm_silences_keep_scale_one() -> None:
    weight = torch.ones(CHANNELS)
    weight[5] = 0
    fold = norm_fold(weight=weight)
    assert fold.representable(torch.full((CHANNELS,), 0.5))[5] == 1.0


def test_heads_that_share_a_value_head_share_its_scales() -> None:
    kv_heads, repeats, head_dim = 2, 4, 8
    smooth = torch.randn(kv_heads * head_dim, 32, generator=torch.Generator().manual_seed(3))
    fold = Fold(smooth, is_norm=False, head_shape=(kv_heads, repeats, head_dim), dtype=torch.float32)
    choice = search_scales(linears(), statistics_of(outlier_inputs()), fold, SEARCH)
    by_head = choice.scales.view(kv_heads, repeats, head_dim)
    assert torch.equal(by_head, by_head[:, :1].expand_as(by_head))
    assert float(choice.scales.max() / choice.scales.min()) > 2
    assert torch.equal(fold.spread(fold.shared(choice.scales)), choice.scales)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (frozenset({"avx512f", "avx512_bf16"}), torch.bfloat16),
        (TILES_NEED, torch.bfloat16),
        (frozenset({"avx512f"}), torch.float32),
    ],
)
def test_candidates_are_ranked_in_the_dtype_that_the_processor_multiplies_fast(
    monkeypatch: pytest.MonkeyPatch, features: frozenset[str], expected: torch.dtype
) -> None:
    monkeypatch.setattr(cpu, "processor", lambda: ("a processor", features))
    assert ranking_dtype(torch.device("cpu")) == expected
