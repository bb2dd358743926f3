"""Experts that the router sends few calibration tokens to: counted, told, and shown every token if asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.core.records.specs import CalibrationSpec, Recipe, SearchSpec
from tests.tiny_models import EngineRun, assignment, some_text, tiny_model, tiny_spec
from workers.child.layer_solver import expert_tokens
from workers.child.work import Work, read_texts
from workers.quantization.calibration import CalibrationPass
from workers.quantization.input_statistics import EXPERT_TOKENS, LayerStatistics

EXPERTS, CHOSEN, LAYERS, TOKENS = 4, 2, 2, 4 * 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "num_hidden_layers": LAYERS}
    return tiny_model(tmp_path_factory.mktemp("model"), "mixtral", **sizes)


def work_of(model: Path, folder: Path, *, all_experts: bool) -> Work:
    calibration = CalibrationSpec(
        texts=(some_text("valid"),), num_samples=4, sequence_length=32, all_experts=all_experts
    )
    recipe = Recipe(group_size=32, search=SearchSpec(grid_points=4))
    return Work.open(assignment(tiny_spec(recipe, calibration=calibration), model, folder))


def first_layer(work: Work) -> tuple[LayerStatistics, list[torch.Tensor]]:
    run = CalibrationPass(work.decoder(), work.batches(read_texts(work).calibration))
    return run.collect(run.decoder.layer_weights(0)), run.states


def test_the_report_counts_the_tokens_that_each_expert_saw(model: Path, tmp_path: Path) -> None:
    run = EngineRun(tiny_spec(Recipe(group_size=32, search=SearchSpec(grid_points=4))), model, tmp_path)
    for layer in run.report.candidates[0].layers:
        seen = layer.experts
        assert seen is not None
        assert (seen.experts, seen.needed, seen.all_shown) == (EXPERTS, EXPERT_TOKENS, False)
        assert 0 <= seen.least <= seen.median <= TOKENS
        assert seen.few == EXPERTS  # of 128 tokens no expert can see 256
    notes = [note for note in run.report.notes if "fewer than 256 calibration tokens" in note]
    assert len(notes) == LAYERS
    assert "layer 0: 4 of 4 experts" in notes[0]
    assert "calibration.all_experts" in notes[0]


def test_counts_of_a_layer_add_up_to_the_choices_of_its_tokens(model: Path, tmp_path: Path) -> None:
    work = work_of(model, tmp_path, all_experts=False)
    statistics, _ = first_layer(work)
    routed = [group.routed_tokens for group in statistics.groups if group.routed_tokens is not None]
    assert sum(routed) == CHOSEN * TOKENS
    seen = expert_tokens(statistics, work.plan.architecture.at(0))
    assert seen is not None
    assert (seen.least, seen.few) == (min(routed), EXPERTS)


def test_with_all_experts_statistics_are_of_every_token_and_outputs_the_routers(
    model: Path, tmp_path: Path
) -> None:
    """Each expert's moment is that of the inputs that all tokens give its last linear."""
    (plain, states), (shown, shown_states) = (
        first_layer(work_of(model, tmp_path, all_experts=asked)) for asked in (False, True)
    )
    for one, other in zip(states, shown_states, strict=True):
        torch.testing.assert_close(other, one)
    for routed, every in zip(plain.groups, shown.groups, strict=True):
        if routed.routed_tokens is None:
            assert torch.equal(every.moment, routed.moment)
            continue
        assert every.routed_tokens == routed.routed_tokens  # what the router says does not change
        assert (every.num_tokens, every.all_shown, every.confidence) == (TOKENS, True, 1.0)
        assert routed.confidence < 1
        assert not torch.allclose(every.moment, routed.moment)
    expected = direct_moments(work_of(model, tmp_path, all_experts=True))
    found = [group.moment for group in shown.groups if group.routed_tokens is not None]
    for moment, direct in zip(found, expected, strict=True):
        torch.testing.assert_close(moment, direct, rtol=1e-4, atol=1e-6)


def direct_moments(work: Work) -> list[torch.Tensor]:
    """Of each expert's last linear, computed from what the router of the first layer reads."""
    run = CalibrationPass(work.decoder(), work.batches(read_texts(work).calibration))
    weights, inputs = run.decoder.layer_weights(0), list[torch.Tensor]()
    with run.decoder.layer(0, weights) as module:
        hook = module.get_submodule("mlp.experts").register_forward_pre_hook(
            lambda _module, arguments: inputs.append(arguments[0])
        )
        with torch.no_grad():
            for index, batch in enumerate(run.states):
                run.call(index)(module, batch)
        hook.remove()
    states, moments = torch.cat(inputs), []
    for number in range(EXPERTS):
        gate, up = (weights[f"block_sparse_moe.experts.{number}.{name}.weight"] for name in ("w1", "w3"))
        inner = torch.nn.functional.silu(states @ gate.T) * (states @ up.T)
        moments.append(inner.T @ inner / len(inner))
    return moments


def test_a_job_with_all_experts_says_so_and_draws_no_scales_towards_one(model: Path, tmp_path: Path) -> None:
    calibration = CalibrationSpec(
        texts=(some_text("valid"),), num_samples=4, sequence_length=32, all_experts=True
    )
    recipe = Recipe(group_size=32, search=SearchSpec(grid_points=4))
    run = EngineRun(tiny_spec(recipe, calibration=calibration), model, tmp_path)
    for layer in run.report.candidates[0].layers:
        assert layer.experts is not None
        assert layer.experts.all_shown
        assert not [linear for linear in layer.linears if "calibration tokens" in (linear.reason or "")]
        assert layer.equivalence_error < 1e-5
    assert not [note for note in run.report.notes if "calibration tokens" in note]
