"""Models and texts that divide by zero where they can: every method ends with finite weights and figures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from app.core.records.specs import CalibrationSpec, Recipe, SearchSpec
from tests.tiny_models import EngineRun, random_model, save_model, some_text, tiny_spec

SEARCH = SearchSpec(grid_points=3, epochs=4)
METHODS = {
    "rtn": {"method": "rtn"},
    "awq": {},
    "awq+gptq": {"rounding": "gptq"},
    "gptq": {"method": "gptq"},
    "omniquant": {"method": "omniquant"},
    "omniquant+gptq": {"method": "omniquant", "rounding": "gptq"},
}


@torch.no_grad()
def unlucky(model: PreTrainedModel) -> PreTrainedModel:
    """Dead channels, rows and groups of zeros, a channel that dwarfs all others, an expert without tokens."""
    for layer in model.get_submodule("model.layers"):
        layer.input_layernorm.weight[:5] = 0
        layer.post_attention_layernorm.weight[7] = 0
        layer.input_layernorm.weight[9] = 1e4
        for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            linear.weight[:, :32] = 0
            linear.weight[3] = 0
        layer.self_attn.o_proj.weight[:] = 0
        experts = getattr(layer.mlp, "experts", None)
        if experts is not None:
            experts.down_proj[1] = 0
            layer.mlp.gate.weight[0] = 0
            layer.mlp.gate.weight[2] = -layer.mlp.gate.weight[1]
        else:
            layer.mlp.gate_proj.weight[:] = 0
    return model


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_every_method_survives_bad_luck(tmp_path: Path, model_type: str) -> None:
    """With one window of eight tokens the second moments are singular, too."""
    changes = {"num_local_experts": 4, "num_experts_per_tok": 1} if model_type == "mixtral" else {}
    model = save_model(unlucky(random_model(model_type, **changes)), tmp_path / "model")  # type: ignore[arg-type]
    recipes = tuple(
        Recipe.model_validate({"group_size": 32, "bits": 2, "search": SEARCH, **method})
        for method in METHODS.values()
    )
    text = CalibrationSpec(texts=(some_text("valid"),), num_samples=1, sequence_length=8)
    spec = tiny_spec(recipes, calibration=text, formats=("compressed-tensors",))
    run = EngineRun(spec, model, tmp_path / "work")
    for candidate in run.report.candidates:
        assert math.isfinite(candidate.perplexity), candidate.label
        assert math.isfinite(candidate.kl), candidate.label
        folder = run.folder("compressed-tensors", candidate.recipe_index)
        for name, value in load_file(folder / "model.safetensors").items():
            assert not value.is_floating_point() or bool(torch.isfinite(value).all()), name
        for entry in (entry for layer in candidate.layers for entry in layer.linears):
            assert entry.loss is not None
            assert math.isfinite(entry.loss)
