"""Bodies of requests: what templates get of them."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, ValidationError

from workers.serving.protocol import Body, ChatRequest, CompletionRequest, JsonSchema, StreamOptions
from workers.serving.routes import refused_body
from workers.texts.chat_template import turn


def chat(*messages: object) -> ChatRequest:
    return ChatRequest.model_validate({"messages": messages})


def test_templates_get_the_arguments_of_earlier_calls_as_objects() -> None:
    """OpenAI's client sends them as text, and no content; templates write arguments with `tojson`."""
    function = {"name": "visit", "arguments": '{"city": "Oslo"}'}
    call = {"id": "call_1", "type": "function", "function": function}
    request = chat(
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "cold"},
    )
    assistant, tool = (turn(message.model_dump(exclude_unset=True)) for message in request.messages)
    assert assistant["content"] == ""
    called = {"name": "visit", "arguments": {"city": "Oslo"}}
    assert assistant["tool_calls"] == [{**call, "function": called}]
    assert tool == {"role": "tool", "tool_call_id": "call_1", "content": "cold"}


@pytest.mark.parametrize(("arguments", "expected"), [({"a": 1}, {"a": 1}), (None, {}), ("", {})])
def test_arguments_may_be_objects_or_absent(arguments: object, expected: object) -> None:
    call = {"function": {"name": "visit", "arguments": arguments}}
    request = chat({"role": "assistant", "tool_calls": [call]})
    assistant = turn(request.messages[0].model_dump(exclude_unset=True))
    assert assistant["tool_calls"][0]["function"]["arguments"] == expected


def test_arguments_that_are_not_json_are_refused() -> None:
    call = {"function": {"name": "visit", "arguments": "{"}}
    with pytest.raises(ValidationError, match="the arguments are not JSON"):
        chat({"role": "assistant", "content": None, "tool_calls": [call]})


NUMBERS = (
    *(
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "max_tokens",
        "n",
        "seed",
        "temperature",
    ),
    *("top_p", "top_k", "min_p", "min_tokens", "prompt_logprobs", "truncate_prompt_tokens"),
)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(
    ("kind", "field"),
    [
        *((kind, field) for kind in (ChatRequest, CompletionRequest) for field in NUMBERS),
        *(
            (ChatRequest, "top_logprobs"),
            (ChatRequest, "max_completion_tokens"),
            (CompletionRequest, "best_of"),
        ),
    ],
)
def test_booleans_are_no_numbers(kind: type[Body], field: str, value: bool) -> None:
    """They were taken for 1 and 0."""
    assert refusal_of(kind, {field: value}) == (field, f"{field}: a number is needed, not true or false")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop_token_ids", [1, True]),
        ("allowed_token_ids", [False]),
        ("prompt", [True, 2]),
        ("prompt", [1, False]),
    ],
)
def test_booleans_are_no_tokens(field: str, value: object) -> None:
    assert refusal_of(CompletionRequest, {field: value}) == (
        field, f"{field}: numbers are needed, not true or false"
    )  # fmt: skip


def test_booleans_are_no_biases() -> None:
    assert refusal_of(CompletionRequest, {"logit_bias": {"5": True}})[0] == "logit_bias.5"


def test_every_number_of_a_body_is_tried_with_booleans() -> None:
    """A field that is added later belongs to the table above."""
    tried = {*NUMBERS, "top_logprobs", "max_completion_tokens", "best_of", "logprobs"}
    for kind in (ChatRequest, CompletionRequest):
        for field, schema in kind.model_json_schema()["properties"].items():
            types = {branch.get("type") for branch in schema.get("anyOf", [schema])}
            assert not types & {"integer", "number"} or field in tried, field


@pytest.mark.parametrize(("given", "expected"), [(False, None), (None, None), (0, 0), (2, 2)])
def test_false_asks_for_no_logprobs_of_a_text(given: object, expected: object) -> None:
    """As in a chat, where the field is a boolean."""
    body = json.dumps({"prompt": "a", "logprobs": given})
    assert CompletionRequest.model_validate_json(body).logprobs == expected


def test_true_asks_for_no_number_of_logprobs() -> None:
    assert refusal_of(CompletionRequest, {"logprobs": True})[0] == "logprobs"


def booleans_of(kind: type[BaseModel]) -> list[str]:
    schemas = kind.model_json_schema()["properties"].items()
    return [
        name
        for name, schema in schemas
        if "boolean" in (branch.get("type") for branch in schema.get("anyOf", [schema]))
        and "const" not in schema.get("anyOf", [schema])[0]
    ]


BOOLEANS = [
    *((kind, name) for kind in (ChatRequest, CompletionRequest) for name in booleans_of(kind)),
    *((CompletionRequest, f"stream_options.{name}") for name in booleans_of(StreamOptions)),
    *((CompletionRequest, f"response_format.json_schema.{name}") for name in booleans_of(JsonSchema)),
]


def test_the_booleans_of_bodies_are_looked_up() -> None:
    assert {
        (ChatRequest, "logprobs"), (CompletionRequest, "echo"), (CompletionRequest, "stream"),
        (CompletionRequest, "stream_options.include_usage"),
        (CompletionRequest, "response_format.json_schema.strict"),
    } <= set(BOOLEANS)  # fmt: skip


@pytest.mark.parametrize("value", [0, 1, 1.0, "yes", "true", "off", [], {}])
@pytest.mark.parametrize(("kind", "field"), BOOLEANS)
def test_only_booleans_are_booleans(kind: type[Body], field: str, value: object) -> None:
    """Numbers and words such as "off" were taken for them."""
    body: object = value
    for name in reversed(field.split(".")):
        body = {"name": "x", "schema": {}, name: body} if name == "strict" else {name: body}
    assert isinstance(body, dict)
    outer = {"stream": True} | body
    if "response_format" in outer:
        outer["response_format"] |= {"type": "json_schema"}
    assert refusal_of(kind, outer) == (field, f"{field}: true or false is needed")


def refusal_of(kind: type[Body], fields: dict[str, object]) -> tuple[str | None, str]:
    """The field and the message of what is told of a body."""
    body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "logprobs": True, **fields}
    if kind is CompletionRequest and "logprobs" not in fields:
        del body["logprobs"]
    with pytest.raises(ValidationError) as fault:
        kind.model_validate_json(json.dumps(body))
    told = refused_body(fault.value)
    return told.param, told.message
