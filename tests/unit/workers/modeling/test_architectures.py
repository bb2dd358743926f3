"""Every architecture of the table: streamed as transformers computes it, and folded without a change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from app.core.formats.file_format import Scheme
from app.core.planning.architectures import architecture_of
from app.core.planning.family import known_family, known_types
from app.core.records.specs import Recipe, SearchSpec
from tests.tiny_models import OTHER_MODELS, fitted_architecture, random_model, save_model, some_tokens
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.decoder import Decoder
from workers.quantization.calibration import EQUIVALENCE_LIMIT, CalibrationPass, equivalence_error
from workers.quantization.folding import Heads, fold_of
from workers.quantization.layer import LayerTask, quantize_layer

BATCHES = [some_tokens(2), some_tokens(2, seed=1)]
RECIPE = Recipe(group_size=32, search=SearchSpec(grid_points=4))


def decoder_of(folder: Path) -> Decoder:
    checkpoint = Checkpoint(folder)
    return Decoder(checkpoint, fitted_architecture(checkpoint), torch.device("cpu"), torch.float32)


@torch.no_grad()
def streamed_logits(decoder: Decoder) -> list[Tensor]:
    states, calls = decoder.start(BATCHES)
    for index in range(decoder.num_layers):
        with decoder.layer(index, decoder.layer_weights(index)) as layer:
            states = [calls.of(number, index)(layer, batch) for number, batch in enumerate(states)]
    with decoder.head() as head:
        return [head(batch) for batch in states]


def layer_task(decoder: Decoder, run: CalibrationPass, layer: int) -> tuple[LayerTask, tuple[Tensor, Tensor]]:
    weights = {name: value.float() for name, value in decoder.layer_weights(layer).items()}
    statistics = run.collect(weights)
    architecture = decoder.architecture.at(layer)
    scheme = Scheme(bits=4, group_size=32, symmetric=False)
    task = LayerTask(
        architecture=architecture,
        recipe=RECIPE,
        schemes=dict.fromkeys(architecture.linears, scheme),
        heads=Heads.of(decoder.checkpoint.config),
        weights=weights,
        statistics=statistics.groups,
        dtype=torch.float32,
    )
    return task, statistics.probe


@pytest.mark.parametrize("model_type", sorted(known_types()))
def test_a_silent_config_ties_the_head_as_transformers_does(model_type: str) -> None:
    ties = getattr(AutoConfig.for_model(model_type), "tie_word_embeddings", False)
    assert architecture_of({"model_type": model_type}, {}).tied == bool(ties)


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    model_type, changes = OTHER_MODELS[name]
    model = random_model(model_type, **changes)  # type: ignore[arg-type]
    decoder = decoder_of(save_model(model, tmp_path))
    for tokens, logits in zip(BATCHES, streamed_logits(decoder), strict=True):
        with torch.no_grad():
            expected = model(tokens, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert all(parameter.is_meta for parameter in decoder.model.parameters())


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_scales_of_the_search_keep_the_function(tmp_path: Path, name: str) -> None:
    model_type, changes = OTHER_MODELS[name]
    model = random_model(model_type, **changes)  # type: ignore[arg-type]
    decoder = decoder_of(save_model(model, tmp_path))
    run = CalibrationPass(decoder, BATCHES)
    for layer in range(2):
        task, probe = layer_task(decoder, run, layer)
        result, folded = quantize_layer(task)
        assert equivalence_error(run, layer, folded, probe) < 2e-6
        matrices = {key for key, value in task.weights.items() if value.dim() == 2 and "norm" not in key}
        routers = {name for group in task.architecture.groups for name in group.compensated}
        assert result.quantized.keys() == {key.removesuffix(".weight") for key in matrices} - routers
        for group in task.architecture.groups:
            entries = [entry for entry in result.report if entry.linear in group.balance_layers]
            scaled = {entry.ratio is not None for entry in entries}
            assert scaled == {group.smooth_layer is not None}
            if group.expert is None:
                assert all((entry.reason is None) is (group.unscaled is None) for entry in entries)
        assert any(entry.scale_spread is not None and entry.scale_spread > 1 for entry in result.report)
        assert equivalence_error(run, layer, result.weights(task.weights), probe) < 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_of_an_offset_norm_are_exact_in_its_dtype(dtype: torch.dtype) -> None:
    weights = {"norm.weight": (0.3 * torch.randn(64)).to(dtype).float(), "fed.weight": torch.randn(8, 64)}
    group = (
        known_family("gemma2")
        .kinds[0]
        .groups[0]
        .model_copy(update={"smooth_layer": "norm", "balance_layers": ("fed",)})
    )
    fold = fold_of(weights, Heads({"num_attention_heads": 1}), group, dtype)
    scales = fold.representable(torch.linspace(0.2, 5, 64))
    stored = (1 + weights["norm.weight"]) / scales - 1
    torch.testing.assert_close(stored.to(dtype).float(), stored, rtol=0, atol=1e-6)
    assert scales.std() > 0.5


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3", "gemma3"])
def test_the_check_of_a_fold_bears_half_precision(tmp_path: Path, name: str) -> None:
    """Near ties of a router fall to other experts for some tokens: that is no fault of the fold."""
    model_type, changes = OTHER_MODELS[name]
    model = random_model(model_type, torch.bfloat16, **changes)  # type: ignore[arg-type]
    checkpoint = Checkpoint(save_model(model, tmp_path))
    architecture = fitted_architecture(checkpoint)
    decoder = Decoder(checkpoint, architecture, torch.device("cpu"), torch.bfloat16)
    run = CalibrationPass(decoder, [some_tokens(2, 64)])
    for layer in range(2):
        task, probe = layer_task(decoder, run, layer)
        folded = quantize_layer(replace(task, dtype=torch.bfloat16))[1]
        assert equivalence_error(run, layer, folded, probe) < 0.03
        wrong = dict(folded)
        wrong["input_layernorm.weight"] = folded["input_layernorm.weight"] + torch.linspace(0, 2, 64)
        assert equivalence_error(run, layer, wrong, probe) > EQUIVALENCE_LIMIT[torch.bfloat16]
