"""Decoder architectures as data: which linears share an input, and what precedes them.

Names are relative to one decoder layer. Sources: the model classes of transformers, and the mappings of
AutoAWQ and llm-compressor as compared in their published code.
"""

from __future__ import annotations

from typing import Literal

from app.core.errors import ModelRefused
from app.core.specs import Frozen

SmoothKind = Literal["norm", "linear"]


class ScaleGroup(Frozen):
    """Linears that read one input, and the layer before them that can absorb its scales.

    `smooth_layer` is divided by the scales along its output, the `balance_layers` are multiplied along
    their input. With grouped-query attention v -> o shares one scale between the query heads of a
    key/value head (`repeats_heads`).
    """

    smooth_layer: str
    smooth_kind: SmoothKind
    balance_layers: tuple[str, ...]
    repeats_heads: bool = False


class Architecture(Frozen):
    """One `model_type`: where its decoder layers are, and the groups of one layer in the order of data."""

    model_type: str
    class_name: str  # of transformers
    groups: tuple[ScaleGroup, ...]
    layers: str = "model.layers"
    head: str = "lm_head"

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears that are quantized, in the order in which data meets them."""
        return tuple(name for group in self.groups for name in group.balance_layers)

    def layer_prefix(self, layer: int) -> str:
        return f"{self.layers}.{layer}."


LLAMA_GROUPS = (
    ScaleGroup(
        smooth_layer="input_layernorm",
        smooth_kind="norm",
        balance_layers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
    ScaleGroup(
        smooth_layer="self_attn.v_proj",
        smooth_kind="linear",
        balance_layers=("self_attn.o_proj",),
        repeats_heads=True,
    ),
    ScaleGroup(
        smooth_layer="post_attention_layernorm",
        smooth_kind="norm",
        balance_layers=("mlp.gate_proj", "mlp.up_proj"),
    ),
    ScaleGroup(smooth_layer="mlp.up_proj", smooth_kind="linear", balance_layers=("mlp.down_proj",)),
)

ARCHITECTURES: dict[str, Architecture] = {
    model_type: Architecture(model_type=model_type, class_name=class_name, groups=LLAMA_GROUPS)
    for model_type, class_name in {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }.items()
}


def architecture_of(config: dict[str, object]) -> Architecture:
    """The architecture named by a model's config.json.

    Raises ModelRefused for one that is not in the table: a wrong mapping would go unnoticed.
    """
    model_type = config.get("model_type")
    found = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    classes = config.get("architectures")
    if found is None or (isinstance(classes, list) and classes and found.class_name not in classes):
        named = f"{model_type} ({', '.join(map(str, classes))})" if isinstance(classes, list) else model_type
        raise ModelRefused(
            f"the architecture {named} is not supported",
            code="architecture_unsupported",
            remedy=f"use a causal language model of one of: {', '.join(sorted(ARCHITECTURES))}",
            param="model",
        )
    return found
