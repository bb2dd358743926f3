"""The sampling defaults and the end tokens in the model's own files.

The one rule, as in transformers 5.24 (`GenerationMixin.adjust_generation_fn`): generation_config.json counts.
Where there is none that is JSON, config.json counts, and in it the part that writes text where the whole says
nothing. A generation_config.json that lacks a field leaves it unset, whatever config.json says.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from app.core.errors import ModelRefused
from workers.serving.protocol import Body

log = logging.getLogger(__name__)

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Settings that change the text in transformers and have no effect here.
NOT_APPLIED = (
    "max_new_tokens", "min_new_tokens", "max_time", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
    "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "guidance_scale",
    "watermarking_config",
)  # fmt: skip
NEUTRAL: tuple[Any, ...] = (None, 0, 1, [])


def read_settings(folder: Path) -> GenerationConfig:
    """Raises ModelRefused for settings that transformers does not read either."""
    try:
        try:
            settings = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except OSError:
            if (folder / "generation_config.json").exists():
                log.warning("generation_config.json is not JSON: config.json is read instead")
            config = json.loads((folder / "config.json").read_text("utf-8"))
            settings = GenerationConfig.from_model_config(config)
    except (TypeError, ValueError, AttributeError) as fault:
        raise ModelRefused(
            f"the model's generation settings can't be read: {fault}", code="config_invalid",
            remedy="correct generation_config.json, or remove it, and submit the model again",
        ) from fault  # fmt: skip
    idle = [name for name in NOT_APPLIED if getattr(settings, name, None) not in NEUTRAL]
    if idle:
        log.warning("the model's generation settings name %s, which this server does not apply", idle)
    return settings


def end_tokens(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Those that end an answer: by the settings, and the tokenizer's own, which vLLM adds as well."""
    named = settings.eos_token_id
    several = (*named, tokenizer.eos_token_id) if isinstance(named, list) else (named, tokenizer.eos_token_id)
    return frozenset(token for token in several if isinstance(token, int) and not isinstance(token, bool))


def sampling_defaults(settings: GenerationConfig) -> dict[str, Any]:
    """The fields of a request that the model sets where the request does not: sampling, and `stop`."""
    named = {name: getattr(settings, name, None) for name in SAMPLING_DEFAULTS}
    defaults: dict[str, Any] = {}
    for name, value in {**named, "stop": settings.stop_strings}.items():
        try:
            usable = getattr(Body.model_validate({name: value}), name)
        except ValidationError:
            log.warning("the model's generation settings name %s %r, which is ignored", name, value)
            continue
        if usable is not None:
            defaults[name] = usable
    return defaults
