"""GPTQ on the quantized chain: its own inputs, and nobody else's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.core.records.specs import JobSpec, Recipe, SearchSpec
from tests.tiny_models import EngineRun, random_model, save_model, tiny_spec
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.decoder import Decoder
from workers.quantization.paired_pass import PairedPass
from workers.texts.windows import calibration_windows, load_tokenizer

AWQ = Recipe(group_size=32, bits=3, search=SearchSpec(grid_points=3))
GPTQ = Recipe(method="gptq", group_size=32, bits=3)
OMNIQUANT = Recipe(method="omniquant", group_size=32, bits=3, search=SearchSpec(grid_points=3, epochs=4))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(random_model("llama"), tmp_path_factory.mktemp("model") / "llama")


def spec(*recipes: Recipe) -> JobSpec:
    return tiny_spec(recipes[0]).model_copy(update={"recipe": recipes, "formats": ("compressed-tensors",)})


def weights_of(run: EngineRun, recipe: int) -> bytes:
    return (run.folder("compressed-tensors", recipe) / "model.safetensors").read_bytes()


def test_the_shared_chain_does_not_notice_a_quantized_one(model: Path, tmp_path: Path) -> None:
    alone = EngineRun(spec(AWQ), model, tmp_path / "alone")
    together = EngineRun(spec(AWQ, GPTQ), model, tmp_path / "together")
    assert weights_of(alone, 0) == weights_of(together, 0)
    assert all(0 < (candidate.gain_over_rounding or 0) < 1 for candidate in together.report.candidates)
    reported = [candidate.inputs for candidate in together.report.candidates]
    assert reported == ["full-precision chain", "quantized chain"]


def test_a_layer_makes_up_for_what_its_quantized_predecessor_lost(model: Path, tmp_path: Path) -> None:
    job = spec(GPTQ)
    run = EngineRun(job, model, tmp_path / "work")
    checkpoint = Checkpoint(model)
    decoder = Decoder(checkpoint, run.opened.plan.architecture, torch.device("cpu"), torch.float32)
    windows = calibration_windows(job.calibration, load_tokenizer(model), None)
    chain = PairedPass(decoder, run.opened.batches(windows))
    checkpoints = run.checkpoints()
    original = decoder.layer_weights(0)
    chain.advance(original, checkpoints.load_layer(0, 0).weights(original))
    original = {name: value.float() for name, value in decoder.layer_weights(1).items()}
    (seen,) = chain.observe((0,), original, original, [None])
    entry = run.report.candidates[0].layers[1].linears[0]
    assert entry.linear == "self_attn.q_proj"
    weight = original["self_attn.q_proj.weight"]
    stored = checkpoints.load_layer(0, 1).quantized["self_attn.q_proj"].dequantize()

    def loss(wanted: Tensor) -> float:
        """Of the stored weights, as the report names it."""
        error = stored - wanted
        return float(((error @ seen.moment) * error).sum())

    assert entry.loss == pytest.approx(loss(seen.corrected(weight)), rel=1e-3)
    assert entry.loss != pytest.approx(loss(weight), rel=1e-3)


def test_the_report_says_what_was_learned(model: Path, tmp_path: Path) -> None:
    (candidate,) = EngineRun(spec(OMNIQUANT), model, tmp_path / "work").report.candidates
    assert candidate.label == "omniquant w3 g32"
    assert candidate.inputs == "quantized chain"
    for layer in candidate.layers:
        assert layer.learning is not None
        assert layer.learning.loss <= layer.learning.loss_start
        assert layer.learning.steps == OMNIQUANT.search.epochs  # one batch of four windows
