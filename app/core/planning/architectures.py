"""Decoder architectures as data: which linears share an input, and what precedes them.

Names are those of checkpoints, relative to one decoder layer. Sources: the model classes and the weight
conversions of transformers, and the mappings of AutoAWQ and llm-compressor as compared in their published
code.
"""

from __future__ import annotations

from app.core.errors import ModelRefused
from app.core.planning.layer_groups import (
    EXPERT,
    LAYER_OUTPUT,
    Architecture,
    Condition,
    Experts,
    ScaleGroup,
    SmoothKind,
)

__all__ = ["ARCHITECTURES", "LAYER_OUTPUT", "Architecture", "Experts", "ScaleGroup", "architecture_of"]


def attention_groups(
    norm: str, joins: str | None, *, kind: SmoothKind = "norm", out: str = "o_proj"
) -> tuple[ScaleGroup, ...]:
    """q, k and v after a norm; the output projection after v."""
    return (
        ScaleGroup(
            smooth_layer=norm,
            smooth_kind=kind,
            balance_layers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ),
        ScaleGroup(
            smooth_layer="self_attn.v_proj",
            balance_layers=(f"self_attn.{out}",),
            repeats_heads=True,
            joins=joins,
        ),
    )


def gated_groups(norm: str, joins: str | None, *, kind: SmoothKind = "norm") -> tuple[ScaleGroup, ...]:
    """gate and up after a norm; down after up, which the activation does not touch."""
    return (
        ScaleGroup(smooth_layer=norm, smooth_kind=kind, balance_layers=("mlp.gate_proj", "mlp.up_proj")),
        ScaleGroup(smooth_layer="mlp.up_proj", balance_layers=("mlp.down_proj",), joins=joins),
    )


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
ATTENTION = attention_groups("input_layernorm", "post_attention_layernorm")
DENSE = gated_groups("post_attention_layernorm", LAYER_OUTPUT)
LLAMA_GROUPS = ATTENTION + DENSE
# Norms stand between these groups' outputs and the stream.
GEMMA_GROUPS = attention_groups("input_layernorm", None, kind="offset norm") + gated_groups(
    "pre_feedforward_layernorm", None, kind="offset norm"
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
            joins="post_attention_layernorm",
        ),
        ScaleGroup(
            smooth_layer="post_attention_layernorm", smooth_kind="norm", balance_layers=("mlp.gate_up_proj",)
        ),
        ScaleGroup(
            smooth_layer="mlp.gate_up_proj",
            smooth_rows="last",
            balance_layers=("mlp.down_proj",),
            joins=LAYER_OUTPUT,
        ),
    ),
)

# One norm feeds attention and MLP, which run side by side.
COHERE = Architecture(
    model_type="cohere",
    class_name="CohereForCausalLM",
    groups=(
        ScaleGroup(smooth_layer="input_layernorm", smooth_kind="norm", balance_layers=QKV + GATE_UP),
        ScaleGroup(
            smooth_layer="self_attn.v_proj",
            balance_layers=("self_attn.o_proj",),
            repeats_heads=True,
            joins=LAYER_OUTPUT,
        ),
        ScaleGroup(smooth_layer="mlp.up_proj", balance_layers=("mlp.down_proj",), joins=LAYER_OUTPUT),
    ),
    fused=(QKV, GATE_UP),
    tied=True,
)

RELU = Condition(key="activation_function", values=("relu", None))
OPT = Architecture(
    model_type="opt",
    class_name="OPTForCausalLM",
    groups=(
        *attention_groups("self_attn_layer_norm", "final_layer_norm", out="out_proj"),
        ScaleGroup(smooth_layer="final_layer_norm", smooth_kind="norm", balance_layers=("fc1",)),
        # A positive factor passes through ReLU, but through no other function.
        ScaleGroup(smooth_layer="fc1", balance_layers=("fc2",), joins=LAYER_OUTPUT, only_if=RELU),
        ScaleGroup(
            balance_layers=("fc2",),
            unscaled=CURVED,
            joins=LAYER_OUTPUT,
            only_if=RELU.model_copy(update={"negated": True}),
        ),
    ),
    fused=(QKV,),
    layers="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    final=("model.decoder.final_layer_norm", "model.decoder.project_out"),
    learned_positions=True,
    tied=True,
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
        ScaleGroup(balance_layers=("mlp.dense_4h_to_h",), unscaled=CURVED, joins=LAYER_OUTPUT),
    ),
    layers="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    final=("gpt_neox.final_layer_norm",),
    stored_names=(("lm_head.", "embed_out."),),
)


def sparse_groups(experts: str, router: str, names: tuple[str, str, str]) -> tuple[ScaleGroup, ...]:
    """gate and up of all experts after the norm that feeds the router too; down of each after its up."""
    gate, up, down = names
    return (
        ScaleGroup(
            smooth_layer="post_attention_layernorm",
            smooth_kind="norm",
            balance_layers=(f"{experts}.{EXPERT}.{gate}", f"{experts}.{EXPERT}.{up}"),
            compensated=(router,),
            observed=router,
            blocks="experts",
        ),
        ScaleGroup(
            smooth_layer=f"{experts}.{EXPERT}.{up}",
            balance_layers=(f"{experts}.{EXPERT}.{down}",),
            expert=f"{experts}.{EXPERT}",
            blocks="experts",
        ),
    )


SHARED_GATE_UP = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")


def with_shared_experts(groups: tuple[ScaleGroup, ...]) -> tuple[ScaleGroup, ...]:
    """The groups of a sparse block of which some experts see every token."""
    first, *others = groups
    joined = first.model_copy(update={"balance_layers": first.balance_layers + SHARED_GATE_UP})
    down = ScaleGroup(
        smooth_layer=SHARED_GATE_UP[1],
        balance_layers=("mlp.shared_experts.down_proj",),
        joins=LAYER_OUTPUT,
        blocks="experts",
    )
    return (joined, *others, down)


def dense_only(groups: tuple[ScaleGroup, ...]) -> tuple[ScaleGroup, ...]:
    return tuple(group.model_copy(update={"blocks": "dense"}) for group in groups)


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Servers hold the experts of a layer in one tensor.
EXPERT_SET = tuple(f"mlp.experts.{EXPERT}.{name}" for name in PROJECTIONS)
DENSE_MLP = dense_only(DENSE)
MIXTRAL = Architecture(
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    groups=ATTENTION + sparse_groups("block_sparse_moe.experts", "block_sparse_moe.gate", ("w1", "w3", "w2")),
    fused=(QKV, tuple(f"block_sparse_moe.experts.{EXPERT}.{name}" for name in ("w1", "w3", "w2"))),
    stored_names=(("mlp.", "block_sparse_moe."),),
    experts=Experts(module="mlp.experts", gate="w1", up="w3", down="w2", count_keys=("num_local_experts",)),
)
QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    groups=ATTENTION + DENSE_MLP + sparse_groups("mlp.experts", "mlp.gate", PROJECTIONS),
    fused=(QKV, GATE_UP, EXPERT_SET),
    experts=Experts(
        module="mlp.experts",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        count_keys=("num_experts", "num_local_experts"),
        dense_layers_key="mlp_only_layers",
        step_key="decoder_sparse_step",
    ),
)

LOW_RANK = Condition(key="q_lora_rank", values=(None,), negated=True)
FULL_RANK = Condition(key="q_lora_rank", values=(None,))


def latent_attention(first: tuple[str, ...], condition: Condition) -> ScaleGroup:
    return ScaleGroup(
        smooth_layer="input_layernorm",
        smooth_kind="norm",
        balance_layers=tuple(f"self_attn.{name}" for name in first),
        only_if=condition,
    )


# Keys and values, and in larger models queries, go through a projection of low rank with a norm of its own.
# kv_b_proj holds a head's keys and values after another, head by head.
DEEPSEEK_GROUPS = (
    latent_attention(("q_a_proj", "kv_a_proj_with_mqa"), LOW_RANK),
    latent_attention(("q_proj", "kv_a_proj_with_mqa"), FULL_RANK),
    ScaleGroup(
        smooth_layer="self_attn.q_a_layernorm",
        smooth_kind="norm",
        balance_layers=("self_attn.q_b_proj",),
        only_if=LOW_RANK,
    ),
    ScaleGroup(
        smooth_layer="self_attn.kv_a_layernorm", smooth_kind="norm", balance_layers=("self_attn.kv_b_proj",)
    ),
    ScaleGroup(
        smooth_layer="self_attn.kv_b_proj",
        smooth_rows="last of each head",
        balance_layers=("self_attn.o_proj",),
        joins="post_attention_layernorm",
    ),
    *DENSE_MLP,
    *with_shared_experts(sparse_groups("mlp.experts", "mlp.gate", PROJECTIONS)),
)


def deepseek(model_type: str, class_name: str) -> Architecture:
    return Architecture(
        model_type=model_type,
        class_name=class_name,
        groups=DEEPSEEK_GROUPS,
        fused=(("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), GATE_UP, SHARED_GATE_UP, EXPERT_SET),
        experts=Experts(
            module="mlp.experts",
            gate="gate_proj",
            up="up_proj",
            down="down_proj",
            count_keys=("n_routed_experts",),
            first_dense_key="first_k_dense_replace",
        ),
    )


ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        llama_like("llama", "LlamaForCausalLM", LLAMA_GROUPS),
        llama_like("mistral", "MistralForCausalLM", LLAMA_GROUPS),
        llama_like("qwen2", "Qwen2ForCausalLM", LLAMA_GROUPS),
        llama_like("qwen3", "Qwen3ForCausalLM", LLAMA_GROUPS),
        llama_like("gemma2", "Gemma2ForCausalLM", GEMMA_GROUPS).model_copy(
            update={"attention": "eager", "tied": True}
        ),
        llama_like("gemma3_text", "Gemma3ForCausalLM", GEMMA_GROUPS).model_copy(update={"tied": True}),
        PHI3,
        COHERE,
        OPT,
        GPT_NEOX,
        MIXTRAL,
        QWEN3_MOE,
        deepseek("deepseek_v2", "DeepseekV2ForCausalLM"),
        deepseek("deepseek_v3", "DeepseekV3ForCausalLM"),
    )
}


def architecture_of(config: dict[str, object]) -> Architecture:
    """The architecture named by a model's config.json, with the groups that its settings leave.

    Raises ModelRefused for one that is not in the table: a wrong mapping would go unnoticed.
    """
    model_type = config.get("model_type")
    entry = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    classes = config.get("architectures")
    if entry is None or (isinstance(classes, list) and classes and entry.class_name not in classes):
        named = f"{model_type} ({', '.join(map(str, classes))})" if isinstance(classes, list) else model_type
        raise ModelRefused(
            f"the architecture {named} is not supported",
            code="architecture_unsupported",
            remedy=f"use a causal language model of one of: {', '.join(sorted(ARCHITECTURES))}",
            param="model",
        )
    for condition in entry.presumes:
        if not condition.holds(config):
            raise ModelRefused(
                f"{model_type} with {condition.key}={config.get(condition.key)!r} is not supported",
                code="architecture_unsupported",
                remedy=f"use a model whose {condition.key} is {condition.values[0]!r}",
                param="model",
            )
    groups = tuple(g for g in entry.groups if g.only_if is None or g.only_if.holds(config))
    fitted: dict[str, object] = {
        "groups": groups,
        "tied": bool(config.get("tie_word_embeddings", entry.tied)),
    }
    if entry.experts is not None:
        fitted |= entry.experts.fitted(config)
    return entry.model_copy(update=fitted)
