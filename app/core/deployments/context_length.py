"""How many tokens a model reads at most."""

from __future__ import annotations

from collections.abc import Mapping

from app.core.errors import InvalidRequest
from app.core.planning.family import text_settings
from app.core.records.serving_options import Engine, ServerOptions

USUAL = 2048
LARGEST = 1e30  # numbers; tokenizers write about that for "no bound"
IN_POSITIONS = ("su", "longrope", "llama3")  # kinds of RoPE that `max_position_embeddings` counts already


def longest_context(config: Mapping[str, object]) -> int:
    """Tokens of a prompt and its answer, by the model's config.json."""
    return int(number_of(text_settings(config).get("max_position_embeddings")) or USUAL)


def widest_context(config: Mapping[str, object]) -> int | None:
    """The most tokens that vLLM reads, which multiplies by RoPE's factor; None where config.json has none."""
    settings = text_settings(config)
    if number_of(settings.get("max_position_embeddings")) is None:
        return None
    rope = settings.get("rope_parameters") or settings.get("rope_scaling")
    factor = 1.0
    if isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) not in IN_POSITIONS:
        factor = number_of(rope.get("factor")) or 1.0
    length = longest_context(config) * max(1.0, factor)
    return int(max(length, number_of(settings.get("model_max_length")) or 0))


def number_of(setting: object) -> float | None:
    """A number of config.json, which anybody may have written; None for what is no positive, finite one."""
    if isinstance(setting, bool) or not isinstance(setting, int | float):
        return None
    return float(setting) if 0 < setting <= LARGEST else None


def check_length(
    config: Mapping[str, object], options: ServerOptions, engine: Engine, *, section: str = ""
) -> None:
    """Raises InvalidRequest for more tokens than the model reads. `auto`: either engine may serve it.

    `section` precedes the field's name in the error.
    """
    own = options.max_model_len
    asked = own if engine == "transformers" else options.for_vllm.max_model_len
    most = longest_context(config) if engine == "transformers" else widest_context(config)
    if asked is not None and most is not None and asked > most:
        raise InvalidRequest(
            f"max_model_len is {asked}; the model reads {most} tokens at most",
            code="max_model_len_too_large",
            remedy=f"ask for at most {most}, or leave it out",
            param=f"{section}{'vllm.' if own is None else ''}max_model_len",
        )
