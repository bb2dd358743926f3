"""GPTQ rounding: the textbook column by column, coordinate descent, and unlucky second moments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.core.errors import RecipeUnsupported
from app.core.formats.file_format import Scheme
from app.core.records.specs import Recipe
from workers.quantization import gptq
from workers.quantization.gptq import OrderedLinear, inverse_factor, round_gptq, solution
from workers.quantization.grid import Grid, grouped_view, min_max_grid
from workers.quantization.rounding import FoldedLinear, round_linear, round_nearest, row_losses

SCHEME = Scheme(bits=3, group_size=32, symmetric=False)


def moment_of(channels: int, seed: int = 0) -> Tensor:
    """A second moment with strong correlations."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(channels) + 0.3 * torch.randn(channels, channels, generator=generator)
    x = torch.randn(4 * channels, channels, generator=generator) @ mixing
    return x.T @ x / x.shape[0]


def weight_of(rows: int, channels: int) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(1))


def grid_of(weight: Tensor, scheme: Scheme = SCHEME) -> Grid:
    return min_max_grid(grouped_view(weight, scheme), scheme, torch.float16)


def textbook(weight: Tensor, grid: Grid, moment: Tensor) -> Tensor:
    """One column after the other, the inverse of what is left recomputed each time; float64."""
    scale = grid.scale.squeeze(-1).repeat_interleave(32, dim=1).double()
    zero = grid.zero.squeeze(-1).repeat_interleave(32, dim=1).double()
    hessian = moment.double()
    hessian = hessian + gptq.DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    left = moment.diagonal().argsort(descending=True, stable=True).tolist()
    values, integers = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.uint8)
    while left:
        column, rest = left[0], left[1:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        wanted = values[:, column] / scale[:, column]
        steps = (wanted.round() + zero[:, column]).clamp(0, 7)
        integers[:, column] = steps.to(torch.uint8)
        error = values[:, column] - (steps - zero[:, column]) * scale[:, column]
        values[:, rest] -= torch.outer(error / inverse[0, 0], inverse[0, 1:])
        left = rest
    return integers


def test_columns_are_rounded_as_in_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "SWEEPS", 0)
    monkeypatch.setattr(gptq, "REFITS", 0)
    monkeypatch.setattr(gptq, "BLOCK", 16)  # several blocks, and groups that straddle them
    weight, moment = weight_of(24, 96), moment_of(96)
    outcome = round_gptq(weight, [grid_of(weight)], SCHEME, moment, torch.float16)
    wanted = textbook(weight, grid_of(weight), moment)
    # float32 against float64: a value half way between two integers may fall either way.
    assert (outcome.weight.q != wanted).float().mean() < 0.005
    assert outcome.damping == gptq.DAMPING


def test_each_sweep_lowers_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = weight_of(40, 128), moment_of(128)
    grid = grid_of(weight)
    losses = [float(row_losses(weight, round_nearest(weight, grid, SCHEME), moment).sum())]
    for sweeps in (0, 1, 3):
        monkeypatch.setattr(gptq, "SWEEPS", sweeps)
        outcome = round_gptq(weight, [grid], SCHEME, moment, torch.float16)
        losses.append(float(row_losses(weight, outcome.weight, moment).sum()))
    assert losses[1] < 0.8 * losses[0]
    assert losses[1] > losses[2] > losses[3]


def test_each_row_goes_on_from_its_best_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "SWEEPS", 0)
    monkeypatch.setattr(gptq, "REFITS", 0)
    weight, moment = weight_of(40, 128), moment_of(128)
    grouped = grouped_view(weight, SCHEME)
    grids = [min_max_grid(grouped, SCHEME, torch.float16, factor=factor) for factor in (1.0, 0.9, 0.7)]
    alone = torch.stack([round_gptq(weight, [grid], SCHEME, moment, torch.float16).losses for grid in grids])
    together = round_gptq(weight, grids, SCHEME, moment, torch.float16)
    torch.testing.assert_close(row_losses(weight, together.weight, moment), together.losses)
    # Damped losses choose, which tell near ties apart otherwise.
    least = alone.min(dim=0).values
    assert bool((together.losses < 1.05 * least).all())
    assert together.losses.sum() < 1.002 * least.sum()
    assert all(bool((losses > least).any()) for losses in alone)


def test_fitted_scales_lower_the_loss_of_the_same_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "FIT_VALUES", 64)  # several rows at a time, not all
    weight, moment = weight_of(40, 128), moment_of(128)
    weight[3, :32] = 0.0  # a group of zeros has no best scale
    grid, linear = grid_of(weight), OrderedLinear.of(weight, moment)
    columns = linear.columns(grid)
    rounded = round_nearest(weight, grid, SCHEME).dequantize().T[linear.order]
    gradient = linear.moment @ (rounded - linear.values)
    fitted = linear.fitted(columns.steps_of(rounded), gradient, columns, torch.float16)
    errors = [rounded - linear.values, fitted.values_of(columns.steps_of(rounded)) - linear.values]
    before, after = ((linear.moment @ error * error).sum(dim=0) for error in errors)
    assert bool((after <= before * 1.00001).all())
    assert after.sum() < 0.98 * before.sum()
    assert torch.equal(fitted.scale.half().float(), fitted.scale)
    assert torch.equal(fitted.scale[0, 3], columns.scale[0, 3])


def test_scales_are_the_solution_of_least_squares() -> None:
    weight, moment = weight_of(3, 64).double(), moment_of(64).double()
    linear = OrderedLinear.of(weight, moment)
    columns = linear.columns(grid_of(weight.float()))
    steps = torch.randint(-3, 4, (64, 3), generator=torch.Generator().manual_seed(2)).double()
    by_group = columns.group.argsort(stable=True)
    matrix = linear.normal_matrix(steps[by_group], by_group, 2).permute(2, 0, 1)
    aims = (steps * (linear.moment @ linear.values))[by_group].view(2, 32, 3).sum(dim=1).T
    found = solution(matrix, aims)
    root = torch.linalg.cholesky(linear.moment).T  # H = root^T root
    for row in range(3):
        columns_of = [
            root[:, columns.group == group] @ steps[columns.group == group, row] for group in (0, 1)
        ]
        aim = (root @ linear.values[:, row])[:, None]
        wanted = torch.linalg.lstsq(torch.stack(columns_of, dim=1), aim).solution
        torch.testing.assert_close(found[row, :, None], wanted, rtol=1e-4, atol=1e-5)


def test_dead_inputs_get_zero_and_harm_nothing() -> None:
    weight, moment = weight_of(16, 64), moment_of(64)
    dead = torch.tensor([3, 40])
    moment[dead] = 0.0
    moment[:, dead] = 0.0
    outcome = round_gptq(weight, [grid_of(weight)], SCHEME, moment, torch.float16)
    assert torch.equal(outcome.weight.dequantize()[:, dead], torch.zeros(16, 2))
    nearest = round_nearest(weight, grid_of(weight), SCHEME)
    assert row_losses(weight, outcome.weight, moment).sum() < row_losses(weight, nearest, moment).sum()


def test_a_singular_moment_is_damped_until_it_factors() -> None:
    direction = torch.ones(64, 1)
    moment = direction @ direction.T  # rank one
    weight = weight_of(8, 64)
    outcome = round_gptq(weight, [grid_of(weight)], SCHEME, moment, torch.float16)
    assert gptq.DAMPING <= outcome.damping <= gptq.MAX_DAMPING
    assert bool(torch.isfinite(outcome.weight.dequantize()).all())


def test_damping_is_raised_step_by_step() -> None:
    moment = torch.eye(32)
    moment[0, 1] = moment[1, 0] = 1.05  # the smallest eigenvalue is -0.05
    _, damping = inverse_factor(moment)
    assert 0.05 < damping <= 0.1


def test_a_moment_that_no_damping_saves_is_refused() -> None:
    with pytest.raises(RecipeUnsupported) as refusal:
        inverse_factor(torch.eye(8) - 10 * torch.ones(8, 8))
    assert refusal.value.code == "moment_singular"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_row_ends_worse_than_rounding_it_to_nearest(bits: int, group_size: int, symmetric: bool) -> None:
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
    weight, moment = weight_of(12, 64), moment_of(64)
    recipe = Recipe.model_validate({"method": "gptq", "bits": bits, "search": {"clip": False}})
    rounded = round_linear(FoldedLinear("linear", weight, moment, scheme, weight), recipe, torch.float16)
    nearest = round_nearest(weight, grid_of(weight, scheme), scheme)
    ours, plain = row_losses(weight, rounded.weight, moment), row_losses(weight, nearest, moment)
    assert bool((ours <= plain * 1.0001).all())
    assert int(rounded.weight.q.max()) < 2**bits
    assert rounded.loss == pytest.approx(float(ours.sum()), rel=1e-3)
    assert rounded.damping is not None


def test_all_zero_weights_stay_zero() -> None:
    weight = torch.zeros(4, 64)
    outcome = round_gptq(weight, [grid_of(weight)], SCHEME, moment_of(64), torch.float16)
    assert torch.equal(outcome.weight.dequantize(), weight)
