"""The streamed forward pass against transformers' own model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny_models import fitted_architecture, random_model, save_model, some_tokens
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.decoder import Decoder

CPU = torch.device("cpu")
CASES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama without grouped heads": ("llama", {"num_key_value_heads": 4}),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a sliding window": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with a window in its second layer": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}  # fmt: skip


def decoder_of(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    checkpoint = Checkpoint(folder)
    return Decoder(checkpoint, fitted_architecture(checkpoint), CPU, dtype)


@torch.no_grad()
def streamed_logits(decoder: Decoder, batches: list[Tensor]) -> list[Tensor]:
    states, calls = decoder.start(batches)
    for index in range(decoder.num_layers):
        with decoder.layer(index, decoder.layer_weights(index)) as layer:
            states = [calls.of(number, index)(layer, batch) for number, batch in enumerate(states)]
    with decoder.head() as head:
        return [head(batch) for batch in states]


@pytest.mark.parametrize(("model_type", "changes"), CASES.values(), ids=list(CASES))
def test_logits_are_those_of_transformers(
    tmp_path: Path, model_type: str, changes: dict[str, object]
) -> None:
    model = random_model(model_type, **changes)  # type: ignore[arg-type]
    decoder = decoder_of(save_model(model, tmp_path))
    batches = [some_tokens(2), some_tokens(2, seed=1), some_tokens(1, seed=2)]  # the last one is smaller
    for tokens, logits in zip(batches, streamed_logits(decoder, batches), strict=True):
        with torch.no_grad():
            expected = model(tokens, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_sliding_window_matters_in_these_models() -> None:
    """Else the test of it above would prove nothing."""
    tokens = some_tokens(1)
    with torch.no_grad():
        windowed, full = (
            random_model("mistral", sliding_window=window)(tokens).logits for window in (8, None)
        )
    assert not torch.allclose(windowed, full, atol=1e-2)


def test_biases_and_head_norms_are_there() -> None:
    qwen2, qwen3 = (dict(random_model(name).named_parameters()) for name in ("qwen2", "qwen3"))
    assert qwen2["model.layers.0.self_attn.q_proj.bias"].abs().min() > 0
    assert qwen3["model.layers.0.self_attn.q_norm.weight"].std() > 0


def test_only_the_loaded_layer_holds_memory(tmp_path: Path) -> None:
    decoder = decoder_of(save_model(random_model("llama"), tmp_path))
    with decoder.layer(0, decoder.layer_weights(0)) as layer:
        assert not any(parameter.is_meta for parameter in layer.parameters())
        assert all(parameter.is_meta for parameter in decoder.layers[1].parameters())
    with decoder.head():
        pass
    decoder.start([some_tokens(1)])
    assert all(parameter.is_meta for parameter in decoder.model.parameters())


def test_memory_is_given_back_after_a_failure(tmp_path: Path) -> None:
    decoder = decoder_of(save_model(random_model("llama"), tmp_path))
    with pytest.raises(IndexError), decoder.layer(1, decoder.layer_weights(1)):
        raise IndexError
    assert all(parameter.is_meta for parameter in decoder.model.parameters())


def test_compute_dtype_is_what_was_asked_for(tmp_path: Path) -> None:
    decoder = decoder_of(save_model(random_model("llama", torch.bfloat16), tmp_path))
    logits = streamed_logits(decoder, [some_tokens(1)])[0]
    assert logits.dtype == torch.float32
