"""Every architecture through the whole engine: transformers opens the files that were evaluated."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from app.core.specs import Recipe, SearchSpec
from tests.tiny_models import OTHER_MODELS, EngineRun, random_model, save_model, some_tokens, tiny_spec
from workers.formats.folder import FormatFolder
from workers.modeling.checkpoint import Checkpoint

RECIPE = Recipe(group_size=32, search=SearchSpec(grid_points=4))


def opened(folder: Path) -> PreTrainedModel:
    """What a user of transformers gets, without any option but the dtype."""
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def dequantized(run: EngineRun, folder: Path) -> PreTrainedModel:
    """transformers' model of the original's files with the weights that our reader finds in the output."""
    plan, source = run.pipeline.plan, run.pipeline.checkpoint
    written = FormatFolder(
        run.folder("compressed-tensors"), "compressed-tensors", source, plan, plan.candidates[0]
    )
    state = load_file(source.folder / "model.safetensors")
    for layer in range(plan.num_layers):
        for name, value in written.read_weights(Checkpoint(written.folder), layer).items():
            full = plan.architecture.layer_prefix(layer) + name
            assert state[full].shape == value.shape
            state[full] = value.to(state[full].dtype).contiguous()
    folder.mkdir()
    shutil.copyfile(source.folder / "config.json", folder / "config.json")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return opened(folder)


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_transformers_opens_what_was_evaluated(tmp_path: Path, name: str) -> None:
    model_type, changes = OTHER_MODELS[name]
    model = save_model(random_model(model_type, **changes), tmp_path / "model")  # type: ignore[arg-type]
    run = EngineRun(tiny_spec(RECIPE), model, tmp_path / "work")
    loaded = opened(run.folder("compressed-tensors"))
    expected = dequantized(run, tmp_path / "dequantized")
    tokens = some_tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, expected(tokens).logits, rtol=1e-5, atol=1e-5)
        windows = run.pipeline.read_texts()[1].tokens
        losses = [loaded(window[None], labels=window[None]).loss.double() for window in windows]
    report = run.report.candidates[0]
    assert float(torch.stack(losses).mean().exp()) == pytest.approx(report.perplexity, rel=1e-5)
    assert 0 < report.kl < 1
    linears = {entry.linear for layer in report.layers for entry in layer.linears if entry.bits == 4}
    assert linears == {name for layer in (0, 1) for name in run.pipeline.plan.architecture.at(layer).linears}


def test_linears_without_scales_are_quantized_and_say_why(tmp_path: Path) -> None:
    model = save_model(random_model("gpt_neox"), tmp_path / "model")
    report = EngineRun(tiny_spec(RECIPE), model, tmp_path / "work").report.candidates[0]
    entries = {entry.linear: entry for entry in report.layers[0].linears}
    assert entries["mlp.dense_4h_to_h"].bits == 4
    assert entries["mlp.dense_4h_to_h"].ratio is None
    assert "activation function" in (entries["mlp.dense_4h_to_h"].reason or "")
    assert entries["attention.dense"].reason is None
