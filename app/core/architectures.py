"""Decoder architectures as data: which linears share an input, and what precedes them.

Names are those of checkpoints, relative to one decoder layer. Sources: the model classes and the weight
conversions of transformers, and the mappings of AutoAWQ and llm-compressor as compared in their published
code.
"""

from __future__ import annotations

from app.core.errors import ModelRefused
from app.core.layer_groups import Architecture, Condition, ScaleGroup, SmoothKind

__all__ = ["ARCHITECTURES", "Architecture", "ScaleGroup", "architecture_of"]


def attention_groups(norm: str, *, kind: SmoothKind = "norm", out: str = "o_proj") -> tuple[ScaleGroup, ...]:
    """q, k and v after a norm; the output projection after v."""
    return (
        ScaleGroup(
            smooth_layer=norm,
            smooth_kind=kind,
            balance_layers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ),
        ScaleGroup(smooth_layer="self_attn.v_proj", balance_layers=(f"self_attn.{out}",), repeats_heads=True),
    )


def gated_groups(norm: str, *, kind: SmoothKind = "norm") -> tuple[ScaleGroup, ...]:
    """gate and up after a norm; down after up, which the activation does not touch."""
    return (
        ScaleGroup(smooth_layer=norm, smooth_kind=kind, balance_layers=("mlp.gate_proj", "mlp.up_proj")),
        ScaleGroup(smooth_layer="mlp.up_proj", balance_layers=("mlp.down_proj",)),
    )


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
LLAMA_GROUPS = attention_groups("input_layernorm") + gated_groups("post_attention_layernorm")
GEMMA_GROUPS = attention_groups("input_layernorm", kind="offset norm") + gated_groups(
    "pre_feedforward_layernorm", kind="offset norm"
)
CURVED = "no scales: the activation function before it is not linear"


def llama_like(model_type: str, class_name: str, groups: tuple[ScaleGroup, ...]) -> Architecture:
    return Architecture(model_type=model_type, class_name=class_name, groups=groups, fused=(QKV, GATE_UP))


PHI3 = Architecture(
    model_type="phi3",
    class_name="Phi3ForCausalLM",
    groups=(
        ScaleGroup(
            smooth_layer="input_layernorm", smooth_kind="norm", balance_layers=("self_attn.qkv_proj",)
        ),
        ScaleGroup(
            smooth_layer="self_attn.qkv_proj",
            smooth_rows="last",
            balance_layers=("self_attn.o_proj",),
            repeats_heads=True,
        ),
        ScaleGroup(
            smooth_layer="post_attention_layernorm", smooth_kind="norm", balance_layers=("mlp.gate_up_proj",)
        ),
        ScaleGroup(smooth_layer="mlp.gate_up_proj", smooth_rows="last", balance_layers=("mlp.down_proj",)),
    ),
)

# One norm feeds attention and MLP, which run side by side.
COHERE = Architecture(
    model_type="cohere",
    class_name="CohereForCausalLM",
    groups=(
        ScaleGroup(smooth_layer="input_layernorm", smooth_kind="norm", balance_layers=QKV + GATE_UP),
        ScaleGroup(smooth_layer="self_attn.v_proj", balance_layers=("self_attn.o_proj",), repeats_heads=True),
        ScaleGroup(smooth_layer="mlp.up_proj", balance_layers=("mlp.down_proj",)),
    ),
    fused=(QKV, GATE_UP),
)

RELU = Condition(key="activation_function", values=("relu", None))
OPT = Architecture(
    model_type="opt",
    class_name="OPTForCausalLM",
    groups=(
        *attention_groups("self_attn_layer_norm", out="out_proj"),
        ScaleGroup(smooth_layer="final_layer_norm", smooth_kind="norm", balance_layers=("fc1",)),
        # A positive factor passes through ReLU, but through no other function.
        ScaleGroup(smooth_layer="fc1", balance_layers=("fc2",), only_if=RELU),
        ScaleGroup(
            balance_layers=("fc2",), unscaled=CURVED, only_if=RELU.model_copy(update={"negated": True})
        ),
    ),
    fused=(QKV,),
    layers="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    final=("model.decoder.final_layer_norm", "model.decoder.project_out"),
    presumes=(Condition(key="do_layer_norm_before", values=(True, None)),),
)

# query_key_value holds a head's q, k and v after another, head by head.
GPT_NEOX = Architecture(
    model_type="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    groups=(
        ScaleGroup(
            smooth_layer="input_layernorm", smooth_kind="norm", balance_layers=("attention.query_key_value",)
        ),
        ScaleGroup(
            smooth_layer="attention.query_key_value",
            smooth_rows="last of each head",
            balance_layers=("attention.dense",),
        ),
        ScaleGroup(
            smooth_layer="post_attention_layernorm", smooth_kind="norm", balance_layers=("mlp.dense_h_to_4h",)
        ),
        ScaleGroup(balance_layers=("mlp.dense_4h_to_h",), unscaled=CURVED),
    ),
    layers="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    final=("gpt_neox.final_layer_norm",),
    stored_names=(("lm_head.", "embed_out."),),
    buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
)

ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        llama_like("llama", "LlamaForCausalLM", LLAMA_GROUPS),
        llama_like("mistral", "MistralForCausalLM", LLAMA_GROUPS),
        llama_like("qwen2", "Qwen2ForCausalLM", LLAMA_GROUPS),
        llama_like("qwen3", "Qwen3ForCausalLM", LLAMA_GROUPS),
        llama_like("gemma2", "Gemma2ForCausalLM", GEMMA_GROUPS).model_copy(update={"attention": "eager"}),
        llama_like("gemma3_text", "Gemma3ForCausalLM", GEMMA_GROUPS),
        PHI3,
        COHERE,
        OPT,
        GPT_NEOX,
    )
}


def architecture_of(config: dict[str, object]) -> Architecture:
    """The architecture named by a model's config.json, with the groups that its settings leave.

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
    for condition in found.presumes:
        if not condition.holds(config):
            raise ModelRefused(
                f"{model_type} with {condition.key}={config.get(condition.key)!r} is not supported",
                code="architecture_unsupported",
                remedy=f"use a model whose {condition.key} is {condition.values[0]!r}",
                param="model",
            )
    groups = tuple(g for g in found.groups if g.only_if is None or g.only_if.holds(config))
    fitted: dict[str, object] = {"groups": groups}
    if found.experts is not None:
        fitted["num_experts"] = found.experts.count(config)
        fitted["dense_layers"] = found.experts.dense_layers(config)
    return found.model_copy(update=fitted)
