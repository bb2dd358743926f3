"""Clip search: the loss it reports is the dense formula's, and no row gets worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from workers.quantization.clip_search import LOWEST, joint_factors, search_clip, smallest_factor
from workers.quantization.grid import Grid, fit_grid, grouped_view, min_max_grid

ROWS, CHANNELS = 6, 64
SCHEMES = [
    Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
    for bits in (2, 3, 4, 8)
    for group_size in (32, -1)
    for symmetric in (False, True)
]


def named(scheme: Scheme) -> str:
    return f"w{scheme.bits} g{scheme.group_size} {'sym' if scheme.symmetric else 'asym'}"


def weights_and_moment(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights with a few large ones; inputs that are correlated over group borders."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, CHANNELS, generator=generator)
    weight[:, ::13] *= 3
    mixed = torch.randn(CHANNELS, CHANNELS, generator=generator)
    x = torch.randn(300, CHANNELS, generator=generator) @ (torch.eye(CHANNELS) + 0.2 * mixed)
    return weight, x.T @ x / len(x)


def dense_loss(weight: Tensor, moment: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """e H e^T of every row, in float64, one row at a time."""
    rounded = grid.nearest(grouped_view(weight, scheme)).view_as(weight)
    errors = (rounded - weight).double()
    return torch.stack([error @ moment.double() @ error for error in errors])


@pytest.mark.parametrize("scheme", SCHEMES, ids=named)
def test_losses_are_those_of_the_dense_formula(scheme: Scheme) -> None:
    weight, moment = weights_and_moment()
    grid, before, after = search_clip(weight, moment, scheme, torch.bfloat16)
    plain = min_max_grid(grouped_view(weight, scheme), scheme, torch.bfloat16)
    torch.testing.assert_close(
        before.double(), dense_loss(weight, moment, plain, scheme), rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(after.double(), dense_loss(weight, moment, grid, scheme), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=named)
@pytest.mark.parametrize("seed", range(3))
def test_no_row_gets_worse(scheme: Scheme, seed: int) -> None:
    weight, moment = weights_and_moment(seed)
    grid, before, after = search_clip(weight, moment, scheme, torch.float16)
    assert bool((after <= before * (1 + 1e-5) + 1e-9).all())
    groups = scheme.groups(CHANNELS)
    assert grid.scale.shape == grid.zero.shape == (ROWS, groups, 1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_group_is_at_least_as_good_as_every_shrunk_range(bits: int, *, symmetric: bool) -> None:
    scheme = Scheme(bits=bits, group_size=-1, symmetric=symmetric)
    weight, moment = weights_and_moment(4)
    _, _, after = search_clip(weight, moment, scheme, torch.float16)
    low, high = (bound[:, None] for bound in weight.aminmax(dim=1, keepdim=True))
    for factor in (1.0, *joint_factors(smallest_factor(weight, scheme))):
        grid = fit_grid(low * factor, high * factor, scheme, torch.float16)
        assert bool((after <= dense_loss(weight, moment, grid, scheme) * (1 + 1e-4)).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_pays_off(bits: int) -> None:
    weight, moment = weights_and_moment(5)
    scheme = Scheme(bits=bits, group_size=32, symmetric=False)
    _, before, after = search_clip(weight, moment, scheme, torch.float16)
    assert float(after.sum()) < 0.9 * float(before.sum())


def test_zeros_and_dead_inputs_are_harmless() -> None:
    weight, moment = weights_and_moment(6)
    weight[0] = 0
    weight[1, :32] = 0
    moment[:40] = 0
    moment[:, :40] = 0
    scheme = Scheme(bits=3, group_size=32, symmetric=False)
    grid, _, after = search_clip(weight, moment, scheme, torch.float16)
    assert bool(torch.isfinite(after).all())
    assert bool(torch.isfinite(grid.nearest(grouped_view(weight, scheme))).all())
    assert float(after[0]) == 0.0


def test_the_weight_is_not_changed() -> None:
    weight, moment = weights_and_moment(7)
    copy, moment_copy = weight.clone(), moment.clone()
    search_clip(weight, moment, SCHEMES[0], torch.float16)
    assert torch.equal(weight, copy)
    assert torch.equal(moment, moment_copy)


def test_percentiles_of_the_weights_bound_the_search() -> None:
    """Ranges as wide as the weights can't shrink far; outliers leave room; fewer bits may leave out more."""
    generator = torch.Generator().manual_seed(8)
    flat = torch.rand(64, 128, generator=generator) - 0.5
    spiked = torch.randn(64, 128, generator=generator)
    spiked[:, 5] = 20.0
    for bits in (2, 3, 4, 8):
        scheme = Scheme(bits=bits, group_size=128, symmetric=False)
        assert smallest_factor(flat, scheme) > 0.85
        assert smallest_factor(spiked, scheme) < 0.2
    normal = torch.randn(64, 128, generator=generator)
    floors = [smallest_factor(normal, Scheme(bits=b, group_size=128, symmetric=True)) for b in (2, 3, 4, 8)]
    assert floors == sorted(floors)
    assert 0.6 < floors[0] < floors[3] < 1.0
    assert smallest_factor(torch.zeros(4, 128), scheme) == 0.0


def test_factors_stay_above_the_bound() -> None:
    assert joint_factors(1.0) == joint_factors(0.96) == ()
    assert joint_factors(0.849) == pytest.approx((0.95, 0.9, 0.85))
    assert min(joint_factors(0.0)) == pytest.approx(LOWEST)
