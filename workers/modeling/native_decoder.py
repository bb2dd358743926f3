"""A served model as one native call a step, where its shape and its processor allow it.

What the call computes is read off transformers' own modules: their weights, norms, windows and rotary tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels.cpu.blocked_layout import BlockedWeight
from kernels.cpu.native import NativeKernel
from kernels.cpu.whole_decoder import DecoderWeights, LayerWeights, NativeDecoder, Weight, unsupported
from workers.modeling.quantized_linear import QuantizedLinear

# Decoders whose layers are those of csrc/cpu/decoder.cpp: norm, attention, norm, gated MLP.
CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Rotary frequencies that don't change with the length of the text.
FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = ("silu", "swish")
LINEARS = {
    "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
    "output": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
NORMS = {
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm",
}  # fmt: skip


def native_decoder(model: PreTrainedModel, positions: int) -> NativeDecoder | str:
    """The decoder for texts of up to `positions` tokens, or why the layers run in PyTorch."""
    why = next(refusals(model), None)
    if why is not None:
        return why
    weights = decoder_weights(model, positions)
    why = unsupported(weights)
    if why is not None:
        return why
    # Matrix units multiply many rows faster than the call does.
    kernels = (module.kernel for module in model.modules() if isinstance(module, QuantizedLinear))
    units = any(isinstance(kernel, NativeKernel) for kernel in kernels)
    return NativeDecoder(weights, reads_prompts=not units)


def refusals(model: PreTrainedModel) -> Iterator[str]:
    """Why a model has another shape than the native call."""
    config, name = model.config, type(model).__name__
    if model.device.type != "cpu":
        yield f"it is for CPUs, not {model.device.type}"
    if name not in CLASSES:
        yield f"{name} is not one of {', '.join(CLASSES)}"
    elif config.hidden_act not in ACTIVATIONS:
        yield f"the activation is {config.hidden_act}, not {ACTIVATIONS[0]}"
    elif rotary_type(config) not in FIXED_ROTARY:
        yield f"rotary positions of type {rotary_type(config)!r}"
    else:
        if any(getattr(module, "rounder", None) is not None for module in model.modules()):
            yield "linears round their inputs"
        if any(getattr(module, "cache_rounder", None) is not None for module in model.modules()):
            yield "keys and values are rounded"
        linears = (m for m in model.modules() if isinstance(m, QuantizedLinear))
        other = next((m for m in linears if blocks_of(m) is None), None)
        if other is not None:
            yield f"it does not read the weights of the backend {other.selection.backend.name}"


def rotary_type(config: Any) -> str:
    parameters = getattr(config, "rope_parameters", None) or {}
    return str(parameters.get("rope_type", "default"))


def blocks_of(linear: QuantizedLinear) -> BlockedWeight | None:
    weight = getattr(linear.kernel, "weight", None)
    return weight if isinstance(weight, BlockedWeight) else None


def decoder_weights(model: PreTrainedModel, positions: int) -> DecoderWeights:
    base, config = model.model, model.config
    attention = base.layers[0].self_attn
    cosines, sines = rotary_table(model, positions, attention.head_dim)
    return DecoderWeights(
        layers=[layer_weights(layer, window_of(layer, config)) for layer in base.layers],
        embedding=base.embed_tokens.weight,
        final_norm=base.norm.weight,
        head=weight_of(model.lm_head),
        cosines=cosines,
        sines=sines,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=attention.head_dim,
        epsilon=base.norm.variance_epsilon,
        scaling=attention.scaling,
    )


def layer_weights(layer: nn.Module, window: int) -> LayerWeights:
    norms = {}
    for name, path in NORMS.items():
        parent, _, last = path.rpartition(".")
        norm = getattr(layer.get_submodule(parent), last, None)
        norms[name] = None if norm is None else norm.weight
    linears = {name: weight_of(layer.get_submodule(path)) for name, path in LINEARS.items()}
    return LayerWeights(linears, norms, window)


def weight_of(linear: nn.Module) -> Weight:
    weight = blocks_of(linear) if isinstance(linear, QuantizedLinear) else linear.weight
    assert isinstance(weight, BlockedWeight | Tensor)
    bias: Any = linear.bias
    return Weight(weight, bias)


def window_of(layer: nn.Module, config: Any) -> int:
    """Tokens that the layer's tokens attend to, themselves included; 0: all.

    Qwen's layers have a window of their own, Mistral's that of the config.
    """
    attention: Any = layer.self_attn
    mistral = type(layer).__name__.startswith("Mistral")
    return int(getattr(config if mistral else attention, "sliding_window", None) or 0)


def rotary_table(model: PreTrainedModel, positions: int, head_size: int) -> tuple[Tensor, Tensor]:
    """float32 (positions, head size / 2) each, rounded to the model's dtype as its module rounds them."""
    cosines, sines = model.model.rotary_emb(torch.zeros(1, dtype=model.dtype), torch.arange(positions)[None])
    half = head_size // 2
    return cosines[0, :, :half].float(), sines[0, :, :half].float()
