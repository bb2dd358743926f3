"""OmniQuant's lesson: never worse than its start, the same twice, and stored as what was measured."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from app.core.formats.file_format import Scheme
from app.core.records.specs import Recipe, SearchSpec
from tests.tiny_models import OTHER_MODELS, fitted_architecture, random_model, save_model, some_tokens
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.decoder import Decoder
from workers.quantization import omniquant
from workers.quantization.calibration import CalibrationPass, equivalence_error
from workers.quantization.folding import Heads
from workers.quantization.layer import LayerResult, LayerTask, OwnChain, quantize_layer
from workers.quantization.omniquant import Draft, Teacher
from workers.quantization.paired_pass import PairedPass

MODELS = {"llama": ("llama", {}), **OTHER_MODELS}
SHORT = [some_tokens(6)]  # one part of a lesson: it judges itself
LONG = [some_tokens(20, 48), some_tokens(20, 48, seed=1)]  # ten parts, of which two judge


class LayerCase:
    """The first layer of a tiny model, ready to be taught."""

    def __init__(
        self,
        folder: Path,
        name: str = "llama",
        dtype: torch.dtype = torch.float32,
        batches: list[Tensor] = SHORT,
    ) -> None:
        model_type, changes = MODELS[name]
        save_model(random_model(model_type, **changes), folder)  # type: ignore[arg-type]
        checkpoint = Checkpoint(folder)
        decoder = Decoder(
            checkpoint,
            fitted_architecture(checkpoint),
            torch.device("cpu"),
            torch.float32,
        )
        self.pair, self.run, self.dtype = (
            PairedPass(decoder, list(batches)),
            CalibrationPass(decoder, list(batches)),
            dtype,
        )
        self.weights = {key: value.to(dtype).float() for key, value in decoder.layer_weights(0).items()}
        collected = self.run.collect(self.weights)
        self.statistics, self.probe = collected.groups, collected.probe
        self.heads = Heads.of(checkpoint.config)

    def task(self, **recipe: object) -> LayerTask:
        body = {"method": "omniquant", "bits": 2, "group_size": 32, **recipe}
        wanted = Recipe.model_validate({"search": SearchSpec(grid_points=3, epochs=4), **body})
        architecture = self.run.decoder.architecture.at(0)
        scheme = Scheme(bits=wanted.bits, group_size=wanted.group_size, symmetric=wanted.symmetric)

        def observe(groups, own, scales):  # type: ignore[no-untyped-def]
            return self.pair.observe(groups, self.weights, own, scales)

        return LayerTask(
            architecture=architecture,
            recipe=wanted,
            schemes=dict.fromkeys(architecture.linears, scheme),
            heads=self.heads,
            weights=self.weights,
            statistics=self.statistics,
            dtype=self.dtype,
            chain=OwnChain(observe, partial(self.pair.lesson, self.weights)),
        )

    def loss(self, result: LayerResult) -> float:
        """Of the layer as it will be stored."""
        lesson, weights = self.pair.lesson(self.weights), result.weights(self.weights)
        with torch.no_grad():
            losses = [
                mse_loss(lesson.forward(weights, inputs), targets) for inputs, targets in lesson.judging
            ]
        return float(torch.stack(losses).mean())


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_taught_and_ends_below_its_start(tmp_path: Path, name: str) -> None:
    case = LayerCase(tmp_path, name)
    result, folded = quantize_layer(case.task())
    assert result.learning is not None
    assert result.learning.loss < 0.99 * result.learning.loss_start
    assert (result.learning.windows, result.learning.judged_on) == (4, 4)  # the same ones
    assert result.learning.steps == 4
    assert case.loss(result) == pytest.approx(result.learning.loss, rel=1e-4)
    assert equivalence_error(case.run, 0, folded, case.probe) < 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_grid_ends_above_its_start(tmp_path: Path, bits: int, group_size: int, symmetric: bool) -> None:
    case = LayerCase(tmp_path, dtype=torch.bfloat16)
    result, _ = quantize_layer(case.task(bits=bits, group_size=group_size, symmetric=symmetric))
    assert result.learning is not None
    assert result.learning.loss <= result.learning.loss_start
    for weight in result.quantized.values():
        assert int(weight.q.max()) < 2**bits
        assert torch.equal(weight.scale.to(torch.bfloat16).float(), weight.scale)
        assert not symmetric or bool((weight.zero == 2 ** (bits - 1)).all())


def test_other_windows_judge_than_those_that_are_learned_from(tmp_path: Path) -> None:
    learning = quantize_layer(LayerCase(tmp_path, "opt with gelu", batches=LONG).task())[0].learning
    assert learning is not None
    assert (learning.windows, learning.judged_on, learning.steps) == (32, 8, 4 * 8)
    assert learning.loss < 0.99 * learning.loss_start


def test_what_holds_for_the_lesson_alone_is_not_kept(tmp_path: Path) -> None:
    """The start gives what is wanted of the windows that are held back: nothing can be better."""
    draft, teacher = draft_of(LayerCase(tmp_path, batches=[*SHORT, *SHORT]))
    with torch.no_grad():
        wanted = teacher.lesson.forward(teacher.stored(teacher.best), teacher.lesson.inputs[-1])
    lesson = replace(teacher.lesson, targets=[*teacher.lesson.targets[:-1], wanted])
    assert lesson.held_back == 1
    learned = Teacher(draft, lesson).teach(4, fixed_integers=True)
    assert (learned.report.loss, learned.report.loss_start) == (0, 0)
    assert learned.quantized is draft.quantized


def test_gptq_s_integers_stay(tmp_path: Path) -> None:
    case = LayerCase(tmp_path)
    rounded, _ = quantize_layer(case.task(method="awq", rounding="gptq"))
    result, _ = quantize_layer(case.task(rounding="gptq"))
    for name, weight in result.quantized.items():
        assert torch.equal(weight.q, rounded.quantized[name].q)
    assert case.loss(result) < case.loss(rounded)


def test_two_lessons_give_the_same_bits(tmp_path: Path) -> None:
    case = LayerCase(tmp_path)
    first, second = (quantize_layer(case.task())[0] for _ in range(2))
    for name, weight in first.quantized.items():
        assert torch.equal(weight.q, second.quantized[name].q)
        assert torch.equal(weight.scale, second.quantized[name].scale)


def draft_of(case: LayerCase) -> tuple[Draft, Teacher]:
    task = case.task(method="awq", rounding="gptq")
    result, folded = quantize_layer(task)
    scaled = tuple(group.smooth_layer is not None for group in task.architecture.groups)
    draft = Draft(task.architecture, task.heads, task.dtype, dict(folded), scaled, dict(result.quantized))
    return draft, Teacher(draft, case.pair.lesson(case.weights))


def test_rates_that_ruin_the_layer_leave_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rate in ("RANGE_RATE", "SCALE_RATE", "WIDTH_RATE"):
        monkeypatch.setattr(omniquant, rate, 10.0)
    draft, teacher = draft_of(LayerCase(tmp_path))
    learned = teacher.teach(4, fixed_integers=False)
    assert learned.report.loss == learned.report.loss_start
    assert learned.quantized == draft.quantized
    assert learned.scales == [None] * len(draft.scaled)


def test_bounds_and_scales_get_gradients(tmp_path: Path) -> None:
    draft, teacher = draft_of(LayerCase(tmp_path))
    bounds, shifts = teacher.layer.parameters()
    for parameter in bounds + shifts:
        parameter.requires_grad_()
    lesson = teacher.lesson
    output: Tensor = lesson.forward(teacher.layer.rounded(), lesson.inputs[0])
    mse_loss(output, lesson.targets[0]).backward()  # type: ignore[no-untyped-call]
    assert len(bounds) == len(draft.quantized)
    assert len(shifts) == len(draft.scaled)
    for parameter in bounds + shifts:
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0
