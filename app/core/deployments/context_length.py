"""How many tokens a model reads at most."""

from __future__ import annotations

from collections.abc import Mapping

from app.core.errors import InvalidRequest
from app.core.planning.family import text_settings

USUAL = 2048


def longest_context(config: Mapping[str, object]) -> int:
    """Tokens of a prompt and its answer, by the model's config.json."""
    return int(str(text_settings(config).get("max_position_embeddings") or USUAL))


def check_context(config: Mapping[str, object], max_model_len: int) -> None:
    """Raises InvalidRequest for more tokens than the model reads."""
    longest = longest_context(config)
    if max_model_len > longest:
        raise InvalidRequest(
            f"max_model_len is {max_model_len}; the model reads {longest} tokens at most",
            code="max_model_len_too_large",
            remedy=f"ask for at most {longest}, or leave it out",
            param="max_model_len",
        )
