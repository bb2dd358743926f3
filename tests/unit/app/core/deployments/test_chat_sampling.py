"""Parameters that a chat starts with, by the files of its model."""

from __future__ import annotations

import json

import pytest

from app.core.deployments.chat_sampling import MODERATE, ChatSampling, chat_sampling
from app.core.errors import NotFound


def sampling(**files: object) -> ChatSampling:
    """Of a model with these files, named without their end; a text stands for itself."""

    def read(path: str) -> bytes:
        content = files.get(path.removesuffix(".json"))
        if content is None:
            raise NotFound(path, code="artifact_not_found", remedy="")
        return content.encode() if isinstance(content, str) else json.dumps(content).encode()

    return chat_sampling(read)


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, {"temperature": 0.6, "top_p": 0.95, "top_k": 20}),
        ({"top_k": 50}, {"top_k": 50}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 1.0, "repetition_penalty": 1.1}, {"temperature": 1.0, "repetition_penalty": 1.1}),
        ({"temperature": 0.7, "top_k": None, "max_new_tokens": 9}, {"temperature": 0.7}),
    ],
)
def test_the_models_own_settings_count(settings: dict[str, object], parameters: dict[str, object]) -> None:
    found = sampling(generation_config=settings)
    assert (found.parameters, found.source) == (parameters, "model")


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({}, {}),
        ({"eos_token_id": 2, "use_cache": True}, {}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"temperature": "hot", "top_p": True, "top_k": -1}, {}),
    ],
)
def test_without_any_it_is_sampled_moderately(settings: dict[str, object], more: dict[str, object]) -> None:
    found = sampling(generation_config=settings)
    assert (found.parameters, found.source) == ({**MODERATE, **more}, "default")


def test_config_json_counts_where_there_is_no_other_that_is_json() -> None:
    config = {"temperature": 0.4}
    assert sampling(config=config).parameters == config
    assert sampling(config=config, generation_config="{").parameters == config
    assert sampling(config=config, generation_config={}).source == "default"
    assert sampling().source == "default"
