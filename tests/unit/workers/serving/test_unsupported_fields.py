"""Every field of OpenAI's and vLLM's requests: it works, is refused in words, or changes no answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.inference import Served
from tests.tiny_models import random_model, save_model
from workers.serving.constraints import closed
from workers.serving.protocol import ChatRequest, CompletionRequest
from workers.serving.unsupported import NO_EFFECT, REFUSED

# The fields of openai 3.57's `chat.completions.create` and `completions.create`, and of vLLM 0.32's requests.
CHAT = """
audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens
messages metadata modalities model moderation n parallel_tool_calls prediction presence_penalty
prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort response_format
safety_identifier seed service_tier stop store stream stream_options temperature tool_choice tools
top_logprobs top_p user verbosity web_search_options add_generation_prompt add_special_tokens
allowed_token_ids bad_words cache_salt chat_template chat_template_kwargs continue_final_message
documents echo ec_transfer_params ignore_eos include_reasoning include_stop_str_in_output
kv_transfer_params length_penalty logprob_token_ids media_io_kwargs min_p min_tokens mm_payload
mm_processor_kwargs priority prompt_logprobs repetition_detection repetition_penalty request_id
return_mm_kwargs return_token_ids return_token_offsets return_tokens_as_token_ids
routed_experts_prompt_start session_id skip_special_tokens spaces_between_special_tokens
stop_token_ids stream_interval structured_outputs thinking_token_budget top_k truncate_prompt_tokens
truncation_side use_beam_search vllm_xargs watermarking guided_json guided_regex guided_choice
guided_grammar guided_whitespace_pattern guided_decoding_backend best_of logits_processors
""".split()  # noqa: SIM905  # a list of 80 would be as many lines
COMPLETION = """
best_of echo frequency_penalty logit_bias logprobs max_tokens model n presence_penalty prompt seed
stop stream stream_options suffix temperature top_p user add_special_tokens allowed_token_ids
bad_words cache_salt ec_transfer_params ignore_eos include_stop_str_in_output kv_transfer_params
length_penalty logprob_token_ids min_p min_tokens mm_payload priority prompt_embeds prompt_logprobs
repetition_detection repetition_penalty request_id response_format return_mm_kwargs return_token_ids
return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start session_id
skip_special_tokens spaces_between_special_tokens stop_token_ids stream_interval structured_outputs
thinking_token_budget top_k truncate_prompt_tokens truncation_side use_beam_search vllm_xargs
watermarking guided_json guided_regex guided_choice guided_grammar logits_processors
""".split()  # noqa: SIM905  # a list of 80 would be as many lines
# A value of each refused field that would change the answer.
TELLING: dict[str, Any] = {
    "audio": {"voice": "ash"}, "bad_words": ["a"], "chat_template": "{{ 1 }}", "echo": True,
    "function_call": "auto", "functions": [{"name": "f"}], "guided_whitespace_pattern": " ",
    "length_penalty": 2, "logits_processors": ["x"], "logprob_token_ids": [1],
    "mm_processor_kwargs": {"a": 1},
    "modalities": ["text", "audio"], "priority": 1, "prompt_embeds": "AAAA",
    "repetition_detection": {"max_pattern_size": 3}, "spaces_between_special_tokens": False,
    "thinking_token_budget": 5, "use_beam_search": True, "verbosity": "low", "vllm_xargs": {"a": 1},
    "watermarking": True, "web_search_options": {},
}  # fmt: skip
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(save_model(random_model("llama"), tmp_path_factory.mktemp("model")))


def ask(served: Served, path: str, body: dict[str, Any]) -> httpx.Response:
    return served.post(path, {"max_tokens": 3, "temperature": 0, **body})


def chat(served: Served, **fields: Any) -> httpx.Response:
    return ask(served, "/v1/chat/completions", {"messages": MESSAGES, **fields})


@pytest.mark.parametrize(("kind", "names"), [(ChatRequest, CHAT), (CompletionRequest, COMPLETION)])
def test_each_field_is_of_one_sort(kind: Any, names: list[str]) -> None:
    declared = {field.alias or name for name, field in kind.model_fields.items()}
    for name in names:
        assert [name in declared, name in REFUSED, name in NO_EFFECT].count(True) >= 1, name
        assert not (name in REFUSED and name in NO_EFFECT), name


@pytest.mark.parametrize("name", sorted(TELLING))
def test_fields_that_would_change_the_answer_are_refused(served: Served, name: str) -> None:
    path, start = "/v1/chat/completions", {"messages": MESSAGES}
    if name == "prompt_embeds":
        path, start = "/v1/completions", {"prompt": "Hi"}
    answer = ask(served, path, {**start, name: TELLING[name]})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert error["message"].startswith(f"{name} is not supported by this server (")
    for neutral in (None, *REFUSED[name].neutral):
        assert ask(served, path, {**start, name: neutral}).status_code == 200, neutral


def test_no_refused_field_is_left_untried() -> None:
    assert set(REFUSED) == set(TELLING)


def test_a_suffix_and_more_answers_than_are_sent_are_refused(served: Served) -> None:
    for field, value in (("suffix", "end"), ("best_of", 3)):
        assert ask(served, "/v1/completions", {"prompt": "Hi", field: value}).status_code == 400
    assert chat(served, best_of=3).status_code == 400


CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
}
SHUT = CITY | {"additionalProperties": False}


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"guided_choice": ["yes", "no"]}, ["yes", "no"]),
        ({"guided_regex": "(ab|cd)e"}, ["abe", "cde"]),
        ({"guided_grammar": 'root ::= "left" | "right"'}, ["left", "right"]),
        ({"guided_grammar": 'start: "left" | "right"'}, ["left", "right"]),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, ["yes", "no"]),
        ({"structured_outputs": {"regex": "(ab|cd)e"}}, ["abe", "cde"]),
        ({"structured_outputs": {"grammar": 'root ::= "left" | "right"'}}, ["left", "right"]),
        ({"structured_outputs": {"json": {"enum": ["a", "b"]}}}, ['"a"', '"b"']),
        ({"guided_json": '{"enum": ["a", "b"]}'}, ['"a"', '"b"']),
        ({"guided_json": {"enum": [1, 2]}}, ["1", "2"]),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_vllms_names_of_constraints(
    served: Served, fields: dict[str, Any], allowed: list[str], path: str
) -> None:
    start = {"messages": MESSAGES} if "chat" in path else {"prompt": "Hi"}
    choice = ask(served, path, {**start, **fields, "max_tokens": 20}).json()["choices"][0]
    assert choice.get("text", choice.get("message", {}).get("content")) in allowed
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"guided_regex": "("}, "the pattern can't be kept to", "guided_regex"),
        ({"guided_grammar": "root ::= nothing"}, "the grammar can't be kept to", "guided_grammar"),
        ({"structured_outputs": {"json": "no JSON"}}, "structured_outputs is not JSON", "structured_outputs"),
        (
            {"structured_outputs": {"structural_tag": "x"}},
            "structural_tag",
            "structured_outputs.structural_tag",
        ),
        ({"guided_choice": []}, "at least 1 is needed", "guided_choice"),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "response_format and guided_regex are given together",
            "guided_regex",
        ),
    ],
)
def test_constraints_that_cannot_be_kept_to(
    served: Served, fields: dict[str, Any], message: str, param: str
) -> None:
    answer = chat(served, **fields)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("open_schema", "expected"),
    [
        (CITY, SHUT),
        ({"type": "object"}, {"type": "object"}),
        (CITY | {"additionalProperties": True}, CITY | {"additionalProperties": True}),
        (CITY | {"patternProperties": {}}, CITY | {"patternProperties": {}}),
        ({"type": "array", "items": CITY}, {"type": "array", "items": SHUT}),
        ({"anyOf": [CITY, {"type": "null"}]}, {"anyOf": [SHUT, {"type": "null"}]}),
        ({"allOf": [CITY, {"properties": {"a": {}}}]}, {"allOf": [CITY, {"properties": {"a": {}}}]}),
        (
            {"$defs": {"c": CITY}, "properties": {"at": {"$ref": "#/$defs/c"}}},
            {"$defs": {"c": SHUT}, "properties": {"at": {"$ref": "#/$defs/c"}},
             "additionalProperties": False},
        ),
        (
            {"$defs": {"c": CITY}, "allOf": [{"$ref": "#/$defs/c"}, {"properties": {"a": {}}}]},
            {"$defs": {"c": CITY}, "allOf": [{"$ref": "#/$defs/c"}, {"properties": {"a": {}}}]},
        ),
    ],
)  # fmt: skip
def test_schemas_without_undeclared_keys(open_schema: dict[str, Any], expected: dict[str, Any]) -> None:
    assert closed(open_schema) == expected


def test_tools_and_strict_formats_admit_declared_keys_alone(served: Served) -> None:
    """As their senders mean them, though their schemas leave additionalProperties out."""
    bias = {
        "logit_bias": {str(token): -100 for token in served.tokenization.encode('"}', special_tokens=False)}
    }
    tool = {"type": "function", "function": {"name": "visit", "parameters": CITY}}
    for fields in (
        {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "visit"}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": CITY, "strict": True},
            }
        },
    ):
        for extra in ({}, bias):
            choice = chat(served, **fields, **extra, max_tokens=40).json()["choices"][0]
            message = choice["message"]
            text = message["content"] or message["tool_calls"][0]["function"]["arguments"]
            assert text.replace(" ", "") in ('{"city":"Rome"}', '{"city":"Oslo"}')
            assert choice["finish_reason"] == "stop"


def test_allowed_tools_are_the_only_ones(served: Served) -> None:
    tools = [{"type": "function", "function": {"name": name, "parameters": CITY}} for name in ("go", "stay")]
    named = {"type": "function", "function": {"name": "stay"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    single = {"parallel_tool_calls": False, "max_tokens": 60}
    message = chat(served, tools=tools, tool_choice=allowed, **single).json()["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["stay"]
    named["function"]["name"] = "run"  # type: ignore[index]
    refused = chat(served, tools=tools, tool_choice=allowed)
    assert "names 'run', which tools lacks" in refused.json()["error"]["message"]


def test_a_format_beside_free_calls_is_refused(tmp_path: Path) -> None:
    folder = save_model(random_model("llama"), tmp_path)
    (folder / "chat_template.jinja").write_text(
        "{{ messages[0].content }}{% if tools %}<tool_call>{% endif %}"
    )
    tool = {"type": "function", "function": {"name": "visit"}}
    answer = chat(Served(folder), tools=[tool], response_format={"type": "json_object"})
    assert answer.json()["error"]["code"] == "tools_with_constraint"
