"""The settings of a config.json on which the function of a layer may depend."""

from __future__ import annotations

import re
import types
from typing import Any, get_args, get_type_hints

from transformers import PretrainedConfig

from app.core.planning.family import NUMBER, Setting

IGNORED = re.compile(
    r"(_token_id|_token_ids|_token_index|_dim|_size|_window|_std|_range|_dropout|_drop|_prob|_coef|_eps|_theta"
    r"|_factor|_heads|_layers|_embeddings|_freqs|_len|_length|_per_tok|_group)$"
    r"|^(_|id2label|label2id|rope|tie_|use_cache|output_|return_|torch_dtype|dtype|architectures|problem_type"
    r"|transformers_version|model_type|is_encoder_decoder|pretraining_tp|initializer|gradient|chunk_size_feed"
    r"|use_mamba_kernels|auto_map|n_positions|quantization|finetuning_task|summary_|scale_attn|tokenizer|"
    r"router_aux|add_router_probs|pad_vocab)"
)


def settings_of(config: PretrainedConfig) -> dict[str, Setting]:
    """Switches, words, and numbers that may be null ("number"), of the text part, by dotted key."""
    text = config.get_text_config()
    prefix = "" if text is config else text_key(config, text)
    hints = nullable(type(text))
    settings: dict[str, Setting] = {}
    for key, value in sorted(text.to_dict().items()):
        if IGNORED.search(key):
            continue
        if value is None or isinstance(value, bool | str):
            settings[prefix + key] = value
        elif isinstance(value, int | float) and key in hints:
            settings[prefix + key] = NUMBER
    return settings


def text_key(config: PretrainedConfig, text: PretrainedConfig) -> str:
    """The dotted path of the text part, with its last dot."""
    for key in config.sub_configs:
        inner = getattr(config, key, None)
        if inner is text:
            return f"{key}."
        if isinstance(inner, PretrainedConfig) and inner.get_text_config() is text:
            return f"{key}.{text_key(inner, text)}"
    return ""


def nullable(config_class: type[PretrainedConfig]) -> set[str]:
    """Keys whose type allows null."""
    try:
        hints: dict[str, Any] = get_type_hints(config_class)
    except (NameError, TypeError):  # annotations that name what only type checkers import
        return set()
    return {key for key, hint in hints.items() if types.NoneType in get_args(hint)}
