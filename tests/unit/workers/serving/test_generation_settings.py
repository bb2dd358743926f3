"""Where the model's files say that an answer ends and how it is sampled, as transformers reads it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from app.core.errors import ModelRefused
from tests.inference import Served
from tests.tiny_models import random_model, save_model
from workers.serving.conversations import chat_prompts
from workers.serving.generation_settings import end_tokens, read_settings, sampling_defaults
from workers.serving.protocol import ChatRequest
from workers.serving.served_model import Prompts
from workers.texts.windows import load_tokenizer

TOKENIZERS_OWN = 0
ABSENT = object()
LISTED, SINGLE, NULL = {"eos_token_id": [7, 201]}, {"eos_token_id": 201}, {"eos_token_id": None}
NESTED = {"text_config": {"eos_token_id": [9]}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(random_model("llama"), tmp_path_factory.mktemp("model"))


def write(folder: Path, generation: object, config: dict[str, Any]) -> Path:
    """A model's folder with these settings and no others."""
    raw = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in raw.items() if key not in ("eos_token_id", "text_config")}
    (folder / "config.json").write_text(json.dumps(kept | config))
    file = folder / "generation_config.json"
    file.unlink(missing_ok=True)
    if generation is not ABSENT:
        file.write_text(generation if isinstance(generation, str) else json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (ABSENT, LISTED, {7, 201}),
        (ABSENT, SINGLE, {201}),
        (ABSENT, NULL, set()),
        (ABSENT, {}, set()),
        (ABSENT, NESTED, {9}),
        (ABSENT, {**NULL, **NESTED}, {9}),
        (ABSENT, {**SINGLE, **NESTED}, {201}),
        ({"eos_token_id": 5}, LISTED, {5}),
        ({"eos_token_id": [5, 6]}, NESTED, {5, 6}),
        (NULL, LISTED, set()),
        ({}, LISTED, set()),
        ("not json", LISTED, {7, 201}),
    ],
)
def test_end_tokens_are_those_of_transformers_and_the_tokenizers_own(
    saved: Path, generation: object, config: dict[str, Any], expected: set[int]
) -> None:
    folder = write(saved, generation, config)
    assert end_tokens(read_settings(folder), load_tokenizer(folder)) == expected | {TOKENIZERS_OWN}
    if "text_config" not in config:
        judged = LlamaForCausalLM.from_pretrained(folder).generation_config.eos_token_id
        assert set(judged if isinstance(judged, list) else [judged]) - {None} == expected


def test_only_tokens_that_the_model_can_write_end_an_answer(saved: Path) -> None:
    write(saved, {"eos_token_id": [5, -1, 4096, True, "x", 1.5]}, {})
    assert Served(saved).tokenization.end_tokens == {5, TOKENIZERS_OWN}


@pytest.mark.parametrize("generation", ["[]", {"watermarking_config": {"greenlist_ratio": 5}}])
def test_settings_that_transformers_does_not_read_are_refused(saved: Path, generation: object) -> None:
    with pytest.raises(ModelRefused, match="generation settings") as refusal:
        read_settings(write(saved, generation, {}))
    assert refusal.value.code == "config_invalid"


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_an_answer_ends_at_a_token_that_only_a_file_names(saved: Path, place: str) -> None:
    """Whichever token the model writes third is named as an end: the answer has two before it."""
    request = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 8}
    free = answer(Served(write(saved, {}, {})), request)
    third = free[2]
    assert len(free) == 8
    assert third not in free[:2]
    named = {"eos_token_id": [4000, third]}
    folder = write(saved, named, {}) if place == "generation_config.json" else write(saved, ABSENT, named)
    assert answer(Served(folder), request) == free[:3]


def answer(served: Served, body: dict[str, Any]) -> list[int]:
    request = ChatRequest.model_validate(body)
    model = served.served
    prompts = chat_prompts(model, request)
    return served.generate(
        [
            {
                "prompt": prompts.ids[0],
                "sampling": model.sampling(request, prompts),
                "stopping": model.stopping(request, prompts, len(prompts.ids[0])),
            }
        ]
    )[0]


SAMPLING = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}


@pytest.mark.parametrize("in_config", [False, True])
def test_sampling_is_the_models_where_the_request_says_nothing(saved: Path, in_config: bool) -> None:
    named = {**SAMPLING, "stop_strings": ["###"]}
    folder = write(saved, ABSENT, named) if in_config else write(saved, named, {})
    assert sampling_defaults(read_settings(folder)) == {**SAMPLING, "stop": ["###"]}
    model = Served(folder).served
    prompts = Prompts([(1,)], None, None)

    def strings(**fields: object) -> tuple[str, ...]:
        messages = [{"role": "user", "content": "x"}]
        request = ChatRequest.model_validate({"messages": messages, **fields})
        return model.stopping(request, prompts, 1).strings

    assert [strings(), strings(stop="a"), strings(stop=["a", "b"])] == [("###",), ("a",), ("a", "b")]


@pytest.mark.parametrize(
    ("named", "value"),
    [("temperature", "hot"), ("top_p", 0), ("min_p", 2), ("top_k", -5), ("stop_strings", 3)],
)
def test_a_setting_that_no_request_may_have_is_left_out_with_a_word(
    saved: Path, caplog: pytest.LogCaptureFixture, named: str, value: object
) -> None:
    settings = read_settings(write(saved, {named: value}, {}))
    with caplog.at_level(logging.WARNING):
        assert sampling_defaults(settings) == {}
    assert repr(value) in caplog.text


def test_settings_without_effect_are_named(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_settings(
            write(saved, {"suppress_tokens": [3], "guidance_scale": 1.0, "no_repeat_ngram_size": 0}, {})
        )
    assert "['suppress_tokens']" in caplog.text
