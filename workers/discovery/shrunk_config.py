"""A config.json with tiny sizes: every setting that a layer's function depends on stays as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

MULTIPLIER = re.compile(r"(?<!dim)_multiplier$")
UNLIKE_ONE = 0.75
VOCABULARY = 4352
PLAIN_TOKENS = 4096  # ids below this one stand for no image, sound or special token
HEADS, SHARED_HEADS = 4, 2
POSITIONS = 256
WINDOW = 64
TEXT_PARTS = ("text", "llm", "language", "decoder", "thinker")

TEXT_SIZES: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size", "dim", "model_dim"), 128
    ),
    **dict.fromkeys(
        (
            "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size_mlp",
            "dense_intermediate_size", "block_ff_dim", "mamba_d_ssm", "lru_width", "attention_hidden_size",
        ),
        256,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
            "shared_intermediate_size", "expert_ffn_hidden_size", "moe_latent_size",
        ),
        128,
    ),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "index_n_heads"), HEADS),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads", "linear_num_key_heads"),
        SHARED_HEADS,
    ),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "linear_num_heads"), 8),
    **dict.fromkeys(
        (
            "head_dim", "global_head_dim", "attention_head_dim", "swa_head_dim", "qk_nope_head_dim",
            "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_d_head",
            "mamba_head_dim", "index_head_dim", "hidden_size_per_layer_input", "v_head_dim", "kv_channels",
        ),
        32,
    ),
    "qk_rope_head_dim": 16, "qk_head_dim": 48, "rotary_dim": 16,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 64),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "laurel_rank", "index_topk"), 16),
    **dict.fromkeys(
        (
            "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts",
        ),
        4,
    ),
    **dict.fromkeys(
        (
            "num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts", "moe_top_k",
            "experts_per_token", "num_selected_experts",
        ),
        2,
    ),
    **dict.fromkeys(
        ("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts",
         "mamba_n_groups", "n_groups", "num_expert_group"),
        1,
    ),
    **dict.fromkeys(("vocab_size", "text_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"), POSITIONS
    ),
}  # fmt: skip
OTHER_SIZES: dict[str, int] = {  # towers for images and sound, which a text never reaches
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "width"), 64),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"), 128),
    **dict.fromkeys(
        (
            "num_attention_heads", "num_heads", "num_key_value_heads", "encoder_attention_heads",
            "decoder_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("head_dim", "downsample_hidden_size", "n_window", "num_position_embeddings"), 16),
    **dict.fromkeys(
        ("num_hidden_layers", "depth", "num_layers", "encoder_layers", "decoder_layers", "n_layers"), 2
    ),
    **dict.fromkeys(
        (
            "out_hidden_size", "output_dim", "text_hidden_size", "projection_dim", "vision_output_dim",
            "projector_input_dim", "projector_output_dim",
        ),
        128,
    ),
    "image_size": 56, "patch_size": 14, "vocab_size": VOCABULARY,
}  # fmt: skip
# Lists of a tower that name its layers.
OTHER_LAYERS = {"deepstack_visual_indexes": [0, 1], "fullatt_block_indexes": [1]}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
COUNTS = re.compile(r"heads$|^n_head|expert(?!.*_size)|top_?k|group|moe_k")  # one stays one
NOT_PASSED = (
    "model_type",
    "quantization_config",
    "transformers_version",
    "_name_or_path",
    "architectures",
    "dtype",
    "auto_map",
)

# Types whose code has the shares of a head's rotary frequencies that the config leaves out.
SECTIONED = (
    "paddleocr_vl_text",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen2_5_omni_text",
    "hunyuan_vl_text",
    "glm4v_text",
    "glm_ocr_text",
    "glm46v_text",
    "glm4v_moe_text",
    "glmga_text",
)

# Sizes that depend on each other in a way of the family's own.
OF_TYPE: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 32},
    "falcon_mamba": {"time_step_rank": 8},
    "mamba": {"time_step_rank": 8},
    "llama4_text": {"num_experts_per_tok": 1},
    "gpt_neo": {"num_heads": 4},
    "gemma3n_text": {"altup_num_inputs": 2},
}
# What a type's own defaults lack, and every checkpoint of it has.
WHERE_NULL: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 32},
    "hunyuan_v1_moe": {"head_dim": 32},
    "hunyuan_vl_text": {"head_dim": 32},
    "ministral": {"head_dim": 32},
    "nemotron": {"num_key_value_heads": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
}


def whole_config(raw: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of a config.json with transformers' defaults for what it leaves out."""
    values = {key: value for key, value in raw.items() if key not in NOT_PASSED}
    return CONFIG_MAPPING[raw["model_type"]](**values)


def shrunk_config(raw: Mapping[str, Any], *, grouped: bool, layers: int = 0) -> PretrainedConfig:
    """The tiny configuration.

    `grouped`: several query heads share a key/value head; `layers`: how many of the first layers are left, if
    not all.
    """
    values = shrunk_values(whole_config(raw).to_dict(), grouped=grouped)
    values = with_layers(values, layers) if layers else values
    return CONFIG_MAPPING[values.pop("model_type")](**values)


def with_layers(values: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The values with the first layers only."""
    count = next((values[key] for key in LAYER_COUNTS if isinstance(values.get(key), int)), None)
    inner = {
        key: with_layers(value, layers)
        for key, value in values.items()
        if isinstance(value, dict) and any(word in key for word in TEXT_PARTS)
    }
    return {**of_layers(values, count, range(layers)), **inner}


def of_layers(values: Mapping[str, Any], count: int | None, chosen: Sequence[int]) -> dict[str, Any]:
    """The values of the `chosen` of `count` layers: in lists with an entry a layer, and dicts by number."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and len(value) == count:
            result[key] = [value[number] for number in chosen if number < count]
        elif isinstance(value, dict) and value and all(is_layer(number, count) for number in value):
            named = {int(number): each for number, each in value.items()}
            result[key] = {new: named[old] for new, old in enumerate(chosen) if old in named}
        else:
            result[key] = len(chosen) if key in LAYER_COUNTS and value == count else value
    return result


def is_layer(key: object, count: int | None) -> bool:
    return str(key).isdecimal() and int(str(key)) < (count or 0)


def shrunk_values(values: Mapping[str, Any], *, grouped: bool) -> dict[str, Any]:
    """Values of the text part, with those of further parts under their keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key in NOT_PASSED and key != "model_type":
            continue
        if isinstance(value, dict) and key.endswith("_config"):
            result[key] = shrunk_part(key, value, grouped=grouped)
        else:
            result[key] = shrunk_value(key, value, TEXT_SIZES)
            if TEXT_SIZES.get(key) == SHARED_HEADS and "head" in key and not grouped and value is not None:
                result[key] = HEADS
    result.update(related_sizes(values))
    missing = WHERE_NULL.get(values.get("model_type", ""), {})
    result.update({key: value for key, value in missing.items() if values.get(key) is None})
    result.update(OF_TYPE.get(values.get("model_type", ""), {}))
    return fewest_sharing(fitting_rotary(result))


def related_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tiny sizes of keys whose size is another key's, or differs from it."""
    related: dict[str, Any] = {}
    rotary, plain = values.get("qk_rope_head_dim"), values.get("qk_nope_head_dim")
    if rotary and plain and values.get("head_dim"):
        sums = {rotary: "qk_rope_head_dim", rotary + plain: "qk_head_dim"}
        related["head_dim"] = TEXT_SIZES[sums.get(values["head_dim"], "head_dim")]
        if rotary == plain:  # a part of each head turns, by a fraction of its own
            related["qk_nope_head_dim"] = TEXT_SIZES["qk_rope_head_dim"]
            related |= {
                key: 2 * TEXT_SIZES["qk_rope_head_dim"]
                for key in ("qk_head_dim", "head_dim")
                if key in values
            }
    for key in ("word_embed_proj_dim", "embedding_size"):
        if values.get(key) not in (None, values.get("hidden_size")):
            related[key] = TEXT_SIZES["hidden_size"] // 2
    return related


def fewest_sharing(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the fewest layers where the last ones read keys and values of earlier ones.

    Of each type that is the first with its own, the last with its own, whose are read, and the first that
    reads. They stand so far behind that almost all would have to be built.
    """
    shared, types = values.get("num_kv_shared_layers"), values.get("layer_types")
    if shared is None or not isinstance(types, list):
        return values
    numbered = list(enumerate(types))
    own, reading = numbered[: len(types) - shared], numbered[len(types) - shared :]
    last = {layer_type: number for number, layer_type in own}
    first = ({layer_type: number for number, layer_type in reversed(each)} for each in (own, reading))
    chosen = sorted({*last.values(), *(number for each in first for number in each.values())})
    reads = sum(number >= len(own) for number in chosen)
    return {**of_layers(values, len(types), chosen), "num_kv_shared_layers": reads}


def shrunk_part(key: str, values: Mapping[str, Any], *, grouped: bool) -> dict[str, Any]:
    named = {"model_type": values["model_type"]} if values.get("model_type") else {}
    if any(word in key for word in TEXT_PARTS):
        return named | shrunk_values(values, grouped=grouped)
    passed = {key: value for key, value in values.items() if key not in NOT_PASSED}
    fewer = with_layers(passed, OTHER_SIZES["num_hidden_layers"])
    return named | {k: OTHER_LAYERS.get(k, shrunk_value(k, v, OTHER_SIZES)) for k, v in fewer.items()}


def shrunk_value(key: str, value: Any, sizes: Mapping[str, int]) -> Any:
    if isinstance(value, list) and key in sizes and all(type(each) is int for each in value):
        return [sizes[key]] * len(value)
    if type(value) is float and value == 1.0 and MULTIPLIER.search(key):
        return UNLIKE_ONE  # as published models have: their stream is joined by a share of the output
    if type(value) is not int:
        return value
    if key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        return 0
    if key.endswith(("token_id", "token_index")):
        return PLAIN_TOKENS + value % (VOCABULARY - PLAIN_TOKENS)
    if key == "sliding_window":
        return min(value, WINDOW)
    if key not in sizes or value <= 0:
        return value
    return min(value, sizes[key]) if COUNTS.search(key) else sizes[key]


def fitting_rotary(values: dict[str, Any]) -> dict[str, Any]:
    """The values with lists of rotary frequencies cut to the tiny heads."""
    head_dim = values.get("head_dim") or TEXT_SIZES["head_dim"]
    if "qk_rope_head_dim" in values:
        head_dim = values["qk_rope_head_dim"]

    def fitting(value: dict[str, Any], partial: float) -> dict[str, Any]:
        pairs = int(head_dim * value.get("partial_rotary_factor", partial)) // 2
        result: dict[str, Any] = {}
        for key, inner in value.items():
            if isinstance(inner, dict):
                result[key] = fitting(inner, partial)
            elif key == "mrope_section" and isinstance(inner, list) and sum(inner):
                shares = [max(1, pairs * each // sum(inner)) for each in inner]
                result[key] = [*shares[:-1], pairs - sum(shares[:-1])]
            elif key in ("long_factor", "short_factor") and isinstance(inner, list):
                result[key] = inner[:pairs]
            else:
                result[key] = inner
        return result

    partial = values.get("partial_rotary_factor") or 1.0
    if values.get("model_type") in SECTIONED:
        values["rope_parameters"] = {"mrope_section": [16, 24, 24], **(values.get("rope_parameters") or {})}
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(values.get(key), dict):
            values[key] = fitting(values[key], partial)
    return values
