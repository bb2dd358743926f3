"""Keys and values are rounded where they enter a cache, as compressed-tensors rounds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from app.core.errors import ModelRefused
from app.core.formats.compressed_tensors import input_arguments
from app.core.formats.schemes import CACHES
from tests.tiny_models import random_model, some_tokens
from workers.modeling.cache_rounding import CacheRounder, cache_scale, round_cache, tap, tapped

KEY, VALUE = torch.tensor([0.011]), torch.tensor([0.004])
ROUNDER = CacheRounder.of("fp8", KEY, VALUE)


class RoundingCache(DynamicCache):  # type: ignore[misc]  # transformers is not checked
    """The slow truth: a cache that itself holds rounded values."""

    def update(self, keys: Tensor, values: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        kept: tuple[Tensor, Tensor] = super().update(*ROUNDER(keys, values), *arguments, **named)
        return kept


def attentions(model: PreTrainedModel) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


def test_scales_and_values_are_those_of_compressed_tensors() -> None:
    x = torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(0)) * 3
    arguments = QuantizationArgs.model_validate(input_arguments(CACHES["fp8"]))
    theirs, zero = calculate_qparams(x.amin(), x.amax(), arguments)
    scale = cache_scale("fp8", x.abs().amax(), torch.float32)
    assert scale.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert scale.item() == pytest.approx(float(x.abs().amax()) / 448, rel=1e-6)
    keys, values = CacheRounder.of("fp8", scale, scale / 2)(x, x)
    assert torch.allclose(keys, fake_quantize(x, scale, zero, arguments), rtol=1e-6)
    assert torch.allclose(values, fake_quantize(x, scale / 2, zero, arguments), rtol=1e-6)
    assert float(values.amax()) == pytest.approx(
        448 * float(scale) / 2
    )  # beyond the range: the largest number
    assert not torch.equal(keys, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_scale_is_one_that_the_file_holds(dtype: torch.dtype) -> None:
    for largest in (7.3, 1e-9, 0.0):
        scale = cache_scale("fp8", torch.tensor(largest), dtype)
        assert torch.equal(scale.to(dtype).float(), scale)
        rounded, _ = CacheRounder.of("fp8", scale, scale)(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
        assert torch.equal(rounded, torch.zeros(1, 1, 2, 4))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "gemma2", "opt"])
def test_a_model_without_a_cache_computes_what_one_with_a_rounded_cache_does(model_type: str) -> None:
    model, tokens = random_model(model_type), some_tokens()
    layers = model.get_submodule("model.decoder.layers" if model_type == "opt" else "model.layers")
    with torch.no_grad():
        plain = model(tokens, use_cache=False).logits
        expected = model(tokens, use_cache=True, cache=RoundingCache()).logits
        for layer in layers:
            round_cache(layer.self_attn, ROUNDER)
        rounded = model(tokens, use_cache=False).logits
    assert torch.allclose(rounded, expected, atol=1e-5)
    assert not torch.allclose(rounded, plain, atol=1e-3)


def test_a_cache_holds_what_was_rounded() -> None:
    model, tokens = random_model("llama"), some_tokens(batch=1)
    for attention in attentions(model):
        round_cache(attention, ROUNDER)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        first = model(tokens[:, :20], cache=cache).logits
        second = model(tokens[:, 20:], cache=cache).logits
    assert torch.allclose(torch.cat([first, second], dim=1), whole, atol=1e-5)
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert torch.equal(ROUNDER(keys, values)[0], keys)
    assert torch.equal(ROUNDER(keys, values)[1], values)


def test_taps_are_there_while_a_layer_runs() -> None:
    model, tokens = random_model("llama"), some_tokens()
    seen: list[Tensor] = []

    def note(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(keys)
        return keys, values

    with torch.no_grad():
        plain = model(tokens).logits
        with tapped(model, {"model.layers.1.self_attn": note}):
            assert torch.equal(model(tokens).logits, plain)
        model(tokens)
    assert [keys.shape for keys in seen] == [(2, 2, 24, 16)]


def test_a_module_without_a_cache_is_refused() -> None:
    with pytest.raises(ModelRefused, match="Linear caches is not clear: it takes none of the arguments"):
        tap(nn.Linear(2, 2), ROUNDER)
