"""Two processes on one calibration: the sums of one, up to the order of additions in float32."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.core.child.assignment import Noted
from app.core.records.specs import CalibrationSpec, EvaluationSpec, JobSpec, Recipe, SearchSpec
from kernels.cpu.float_products import use_whole_vectors
from tests import float_precision
from tests.families_in_memory import family_model
from tests.tiny_models import (
    OTHER_MODELS,
    TEXTS,
    EngineRun,
    assignment,
    random_model,
    save_model,
    some_text,
    tiny_model,
    tiny_spec,
)
from workers.child.quantized_chains import QuantizedChains
from workers.child.ranks import SharedLayers, start_pass, started
from workers.child.stage_clock import StageClock
from workers.child.work import Work, read_texts
from workers.quantization.input_statistics import InputStatistics
from workers.quantization.reduction import ALONE, Ranks
from workers.texts.windows import Windows

SAMPLES, LENGTH = 40, 256  # more than one batch
OMNIQUANT = Recipe(method="omniquant", group_size=32, bits=3, search=SearchSpec(grid_points=3, epochs=2))


@pytest.fixture(autouse=True)
def whole_vectors() -> Iterator[None]:
    """What this process computes is compared with what a further device's does."""
    with float_precision.restored():
        use_whole_vectors(torch.device("cpu"))
        yield


def spec(recipe: Recipe, **changes: object) -> JobSpec:
    text = (TEXTS / "valid.txt").read_text("utf-8")[:60000]
    calibration = CalibrationSpec(texts=(text,), num_samples=SAMPLES, sequence_length=LENGTH)
    evaluation = EvaluationSpec(texts=(some_text("test"),), num_samples=2)
    return tiny_spec(recipe, calibration=calibration, evaluation=evaluation, **changes)


class Witness:
    """What calibration and a recipe's own chain give of every layer; the copy's weights are made up."""

    def __init__(self, work: Work, calibration: Windows, ranks: Ranks, clock: StageClock) -> None:
        candidate = work.plan.candidates[0]
        self.inputs: list[InputStatistics] = []
        self.pairs: list[InputStatistics] = []
        self.lessons: list[Tensor] = []
        run = start_pass(work, calibration, work.checkpoints(clock), 0, ranks)
        chains = QuantizedChains((candidate,), run.decoder, work.batches(calibration), ranks, clock)
        chain = chains.passes[0]
        for layer in range(work.plan.num_layers):
            original = {name: value.float() for name, value in run.decoder.layer_weights(layer).items()}
            self.inputs += run.collect(original).groups
            view = chains.view(candidate, original)
            assert view is not None
            own = {name: value * 0.97 for name, value in original.items()}
            for stage in run.decoder.architecture.at(layer).stages:
                scales = [None if index % 2 else self.scales(run.decoder, layer, index) for index in stage]
                self.pairs += view.observe(stage, own, scales)
            lesson = view.lesson()
            with torch.no_grad():
                outputs = [lesson.forward(own, inputs) for inputs in lesson.inputs]
            self.lessons += [*lesson.inputs, *lesson.targets, *outputs]
            chains.advance(candidate, original, Copied(own))  # type: ignore[arg-type]
        assert chain.layer == work.plan.num_layers

    def scales(self, decoder, layer: int, index: int) -> Tensor:  # type: ignore[no-untyped-def]
        group = decoder.architecture.at(layer).groups[index]
        weight = decoder.layer_weights(layer)[group.balance_layers[0] + ".weight"]
        return torch.linspace(0.9, 1.1, weight.shape[1])


class Copied:
    """A layer's result that is nothing but its weights."""

    def __init__(self, own: dict[str, Tensor]) -> None:
        self.own = own

    def weights(self, original: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.own


def model_of(name: str) -> PreTrainedModel:
    if name == "gemma3n":
        kinds = ["sliding_attention", "full_attention"] * 2
        sparse = [0.95, 0.0, 0.0, 0.0]
        return family_model(
            "gemma3n_text", num_hidden_layers=4, num_kv_shared_layers=2, layer_types=kinds,
            intermediate_size=[256] * 4, activation_sparsity_pattern=sparse,
        )  # fmt: skip
    model_type, changes = OTHER_MODELS[name]
    return random_model(model_type, **changes)  # type: ignore[arg-type]


def assert_same_sums(found: InputStatistics, expected: InputStatistics) -> None:
    """Documented tolerance: float32 sums of the same terms in another order."""
    assert found.num_tokens == expected.num_tokens
    assert found.routed_tokens == expected.routed_tokens
    scale = float(expected.moment.diagonal().mean())
    torch.testing.assert_close(found.abs_mean, expected.abs_mean, rtol=1e-5, atol=1e-5 * scale**0.5)
    torch.testing.assert_close(found.moment, expected.moment, rtol=1e-4, atol=1e-5 * scale)


# The first layer of qwen3-moe is dense; layers of gemma3n read keys and values of earlier ones.
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gemma3n"])
def test_two_processes_give_the_sums_of_one(name: str, tmp_path: Path) -> None:
    """Of the original, of experts and of a recipe's own chain; OmniQuant's lesson is the same, too."""
    model = save_model(model_of(name), tmp_path / "model")
    recipe = OMNIQUANT.model_copy(update={"indivisible": "skip"})
    given = assignment(spec(recipe), model, tmp_path, threads=1, calibration_devices=["cpu"])
    messages: list[object] = []
    work = Work.open(given)
    clock = StageClock(messages.append, work.device, work.plan.num_layers)
    calibration = read_texts(work).calibration
    assert len(work.batches(calibration)) == 2
    alone = Witness(work, calibration, ALONE, clock)
    layers = SharedLayers.of(range(work.plan.num_layers), work.plan.candidates)
    with started(work, calibration, layers, clock) as ranks:
        assert ranks == Ranks(0, 2)
        shared = Witness(work, calibration, ranks, clock)
    assert len(shared.inputs) == len(alone.inputs)
    for found, expected in zip(shared.inputs, alone.inputs, strict=True):
        assert_same_sums(found, expected)
    for pair, wanted in zip(shared.pairs, alone.pairs, strict=True):
        assert_same_sums(pair, wanted)
        for drift, other in (
            (pair.input_drift, wanted.input_drift),
            (pair.output_drift, wanted.output_drift),
        ):
            if other is not None:
                torch.testing.assert_close(drift, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))
    for taught, lesson in zip(shared.lessons, alone.lessons, strict=True):
        torch.testing.assert_close(taught, lesson, rtol=1e-5, atol=1e-5)
    told = [message.message for message in messages if isinstance(message, Noted)]
    assert told == ["cpu, cpu share the calibration batches; cpu alone searches, rounds and learns"]


def test_a_target_is_searched_on_all_devices(tmp_path: Path) -> None:
    """Also what the ladder tries: each try on its own chain starts the other devices again."""
    model = tiny_model(tmp_path / "model")
    wanted = spec(
        Recipe(method="gptq", group_size=64, bits=2, search=SearchSpec(clip=False)), target={"max_kl": 0.073}
    )
    works = [tmp_path / "one", tmp_path / "two"]
    for work in works:
        work.mkdir()
    one = EngineRun(wanted, model, works[0], threads=1)
    two = EngineRun(wanted, model, works[1], threads=1, calibration_devices=["cpu"])
    assert len(two.report.tries) == len(one.report.tries) == 2
    for found, expected in zip(two.report.tries, one.report.tries, strict=True):
        assert found.recipe == expected.recipe
        assert found.kl == pytest.approx(expected.kl, rel=0.02)
    assert sum("share the calibration batches" in note for note in two.report.notes) == 2


def test_one_batch_needs_no_other_process(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    run = EngineRun(tiny_spec(), model, tmp_path, calibration_devices=["cpu", "cpu"])
    assert run.report.candidates[0].kl >= 0
    assert "the text has 1 calibration batches: 2 devices stay idle" in run.report.notes


@pytest.mark.parametrize(
    ("end", "words"),
    [("raise SystemExit(3)", "exit code 3"), ("import os; os.kill(os.getpid(), 9)", "signal 9 (Killed)")],
)
def test_a_process_that_fails_ends_the_job_child(end: str, words: str) -> None:
    """Without its sums nothing can be finished, and waiting for them would last for ever."""
    program = (
        "import sys, time\n"
        "from app.core.child.owned_process import OwnedProcess\n"
        "from workers.child.ranks import end_with, write_line\n"
        f"words = ['--program', sys.executable, '-c', 'print(\"its last line\", flush=True); {end}']\n"
        "end_with(OwnedProcess(words, on_line=write_line), 1)\n"
        "time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.endswith(f"its last line\ncalibration rank 1 ended with {words}\n")
