"""How a chat is sampled when its user says nothing: as the model's own files ask, else moderately."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from app.core.errors import NotFound
from app.core.records.specs import Frozen

FILES = ("generation_config.json", "config.json")  # the first that is JSON counts, as in transformers
CHOOSING = ("temperature", "top_p", "top_k", "min_p")
FIELDS = (*CHOOSING, "repetition_penalty")
# Temperature 1 draws from the whole tail of the vocabulary: in an answer of some hundred tokens an unlikely
# one is all but sure, and small or quantized models do not find back from it.
MODERATE: dict[str, int | float] = {"temperature": 0.7, "top_p": 0.95}


class ChatSampling(Frozen):
    """The parameters that a chat starts with, and who named them."""

    parameters: dict[str, int | float]
    source: Literal["model", "default"]


def chat_sampling(read: Callable[[str], bytes]) -> ChatSampling:
    """Of an artifact whose files `read` gives; it raises NotFound for those that are absent."""
    for path in FILES:
        try:
            settings = json.loads(read(path))
        except (NotFound, ValueError):
            continue
        if isinstance(settings, Mapping):
            return of_settings(settings)
    return ChatSampling(parameters=MODERATE, source="default")


def of_settings(settings: Mapping[str, Any]) -> ChatSampling:
    named = {
        name: value
        for name in FIELDS
        if isinstance(value := settings.get(name), int | float) and not isinstance(value, bool) and value >= 0
    }
    if any(name in named for name in CHOOSING):
        return ChatSampling(parameters=named, source="model")
    return ChatSampling(parameters={**MODERATE, **named}, source="default")
