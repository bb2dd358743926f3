"""The original and its quantized copy side by side, on every architecture of the table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.core.planning.architectures import LAYER_OUTPUT, ScaleGroup
from tests.tiny_models import OTHER_MODELS, fitted_architecture, random_model, save_model, some_tokens
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.decoder import Decoder
from workers.quantization.calibration import CalibrationPass
from workers.quantization.folding import Heads, fold_scales
from workers.quantization.input_statistics import InputStatistics
from workers.quantization.observation import watching
from workers.quantization.paired_pass import Drift, PairedPass
from workers.quantization.scale_search import ScaleChoice

MODELS = {"llama": ("llama", {}), "qwen2": ("qwen2", {}), **OTHER_MODELS}


def paired(folder: Path, model_type: str = "llama", **changes: object) -> PairedPass:
    folder = save_model(random_model(model_type, **changes), folder)  # type: ignore[arg-type]
    checkpoint = Checkpoint(folder)
    decoder = Decoder(checkpoint, fitted_architecture(checkpoint), torch.device("cpu"), torch.float32)
    return PairedPass(decoder, [some_tokens(2), some_tokens(2, seed=1)])


def weights_of(run: PairedPass) -> dict[str, Tensor]:
    return {name: value.float() for name, value in run.decoder.layer_weights(run.layer).items()}


def disturbed(weights: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """The weights with noise in some linears."""
    generator = torch.Generator().manual_seed(3)
    noise = {
        key: value + 0.1 * value.std() * torch.randn(value.shape, generator=generator)
        for key, value in weights.items()
        if key.removesuffix(".weight") in names
    }
    return {**weights, **noise}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_groups_join_the_residual_stream_where_the_table_says(tmp_path: Path, name: str) -> None:
    """Twice the weights add the linear's output once more, and change nothing else up to there."""
    run = paired(tmp_path, MODELS[name][0], **MODELS[name][1])
    joined = 0
    for _ in range(2):
        weights, architecture = weights_of(run), run.decoder.architecture.at(run.layer)
        for group in (group for group in architecture.groups if group.joins is not None):
            key = group.balance_layers[0] + ".weight"
            with (
                run.decoder.layer(run.layer, weights) as module,
                watching(module, architecture, [group]) as seen,
            ):
                batch, call = run.own[0], run.call(0)
                once = seen.run(module, {}, batch, call)
                doubled = run.state_of(module, {**weights, key: 2 * weights[key]})
                twice = seen.run(module, doubled, batch, call)
            added = once[group.source] @ weights[key].T
            assert group.joins is not None
            torch.testing.assert_close(twice[group.joins] - once[group.joins], added, rtol=1e-3, atol=1e-4)
            joined += 1
        run.advance(weights, weights)
    assert (joined > 0) is not name.startswith("gemma")


@pytest.mark.parametrize("name", MODELS)
def test_a_scaled_copy_lacks_nothing(tmp_path: Path, name: str) -> None:
    run = paired(tmp_path, MODELS[name][0], **MODELS[name][1])
    weights, architecture = weights_of(run), run.decoder.architecture.at(0)
    heads = Heads.of(run.decoder.checkpoint.config)
    group = architecture.groups[0]
    channels = weights[group.balance_layers[0] + ".weight"].shape[1]
    choice = ScaleChoice(torch.linspace(0.5, 2, channels), 0.5, 0.0, 0.0, 0.0)
    choices = [choice, *[None] * (len(architecture.groups) - 1)]
    own = fold_scales(weights, heads, architecture.groups, choices)
    for stage in architecture.stages:
        scales = [None if choices[index] is None else choice.scales for index in stage]
        for index, seen in zip(stage, run.observe(stage, weights, own, scales), strict=True):
            for linear in architecture.groups[index].balance_layers:
                value = own[linear + ".weight"]
                torch.testing.assert_close(seen.corrected(value), value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("stage", "linear"), [(1, "self_attn.o_proj"), (3, "mlp.down_proj")])
def test_the_correction_brings_the_stream_nearer_to_the_original(
    tmp_path: Path, stage: int, linear: str
) -> None:
    run = paired(tmp_path)
    weights = weights_of(run)
    own = disturbed(weights, "self_attn.v_proj", "self_attn.q_proj", "mlp.up_proj")
    (seen,) = run.observe((stage,), weights, own, [None])
    corrected = {**own, linear + ".weight": seen.corrected(own[linear + ".weight"])}

    def distance(mine: dict[str, Tensor]) -> float:
        group = run.decoder.architecture.at(0).groups[stage]
        with (
            torch.no_grad(),
            run.decoder.layer(0, weights) as module,
            watching(module, run.decoder.architecture, [group]) as watched,
        ):
            batch, call = run.own[0], run.call(0)
            wanted = watched.run(module, {}, batch, call)
            found = watched.run(module, run.state_of(module, mine), batch, call)
        assert group.joins is not None
        return float((wanted[group.joins] - found[group.joins]).square().mean())

    assert distance(corrected) < 0.8 * distance(own)


def test_a_forward_pass_ends_where_nothing_more_is_needed(tmp_path: Path) -> None:
    run = paired(tmp_path)
    weights = weights_of(run)
    with run.decoder.layer(0, weights) as module, torch.no_grad():
        for stage, whole in ((0, False), (1, False), (2, False), (3, True)):
            group = run.decoder.architecture.at(0).groups[stage]
            with watching(module, run.decoder.architecture, [group]) as seen:
                found = seen.run(module, {}, run.own[0], run.call(0))
            assert (LAYER_OUTPUT in found) is whole


def test_experts_have_moments_but_no_pairs(tmp_path: Path) -> None:
    run = paired(tmp_path, *OTHER_MODELS["mixtral"][:1], **OTHER_MODELS["mixtral"][1])
    weights, architecture = weights_of(run), run.decoder.architecture.at(0)
    stage = next(stage for stage in architecture.stages if architecture.groups[stage[0]].expert)
    assert len(stage) == 4
    for seen in run.observe(stage, weights, weights, [None] * 4):
        assert seen.routed_tokens is not None
        value = torch.randn(8, seen.moment.shape[0])
        assert torch.equal(seen.corrected(value), value)


@pytest.mark.parametrize("factor", [1.0, 300.0])
def test_a_token_with_a_large_stream_does_not_decide_alone(factor: float) -> None:
    """What the stream lacks is a linear function of the input for all tokens but the first."""
    generator = torch.Generator().manual_seed(0)
    own, stream = torch.randn(500, 8, generator=generator), torch.randn(500, 16, generator=generator)
    missing = own @ torch.randn(8, 16, generator=generator)
    missing[0] = torch.randn(16, generator=generator)
    for value in (stream, missing):
        value[0] *= factor
    drift = Drift(ScaleGroup(balance_layers=("down",), joins=LAYER_OUTPUT), None)
    drift.add({LAYER_OUTPUT: stream}, {"down": own, LAYER_OUTPUT: stream - missing})
    correction = drift.result("down").corrected(torch.zeros(16, 8))
    left = (missing - own @ correction.T)[1:].norm() / missing[1:].norm()
    assert left < 0.05


@torch.no_grad()
def test_the_original_runs_once_a_layer(tmp_path: Path) -> None:
    run = paired(tmp_path)
    weights, architecture = weights_of(run), run.decoder.architecture.at(0)
    own = disturbed(weights, "self_attn.v_proj")
    alone = paired(tmp_path / "alone")
    alone.advance(weights, own)
    first = run.referenced(weights)
    for stage in architecture.stages:
        run.observe(stage, weights, own, [None] * len(stage))
        assert run.references is first
    run.advance(weights, own)
    for mine, other in ((run.original, alone.original), (run.own, alone.own)):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_a_pass_that_is_ahead_gives_the_same_bits(tmp_path: Path) -> None:
    """A resumed job runs the original by itself up to where it was killed."""
    alone, shared = paired(tmp_path / "alone"), paired(tmp_path / "shared")
    run = CalibrationPass(shared.decoder, [some_tokens(2), some_tokens(2, seed=1)])
    shared.read_from(run)
    for _ in range(2):
        weights = weights_of(alone)
        own = disturbed(weights, "self_attn.v_proj")
        run.collect(weights)
        for stage in alone.decoder.architecture.at(alone.layer).stages:
            mine, theirs = (
                each.observe(stage, weights, own, [None] * len(stage)) for each in (alone, shared)
            )
            for one, other in zip(mine, theirs, strict=True):
                assert torch.equal(one.moment, other.moment)
                for name in ("input_drift", "output_drift"):
                    drifts = getattr(one, name), getattr(other, name)
                    assert drifts == (None, None) or torch.equal(*drifts)
        assert shared.references is run.references
        for each in (alone, shared):
            each.advance(weights, own)
        assert all(torch.equal(a, b) for a, b in zip(alone.original, shared.original, strict=True))


def statistics(moment: Tensor, tokens: int, drift: Tensor) -> InputStatistics:
    return InputStatistics(moment.diagonal().sqrt(), moment, tokens, output_drift=drift)


def test_the_correction_shrinks_with_few_tokens_and_stays_away_without_any_signal() -> None:
    weight, drift = torch.randn(4, 32), torch.randn(4, 32)
    few, many = (
        statistics(torch.eye(32), tokens, drift).corrected(weight) - weight for tokens in (32, 10**6)
    )
    torch.testing.assert_close(few, many / 2, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(many, drift / 1.01, rtol=1e-3, atol=1e-4)
    silent = statistics(torch.zeros(32, 32), 100, drift)
    assert torch.equal(silent.corrected(weight), weight)
    for missing in (torch.inf, torch.nan, 1e5):  # the last one is more than files hold
        beyond = statistics(torch.eye(32), 100, torch.full((4, 32), missing))
        assert torch.equal(beyond.corrected(weight), weight)
