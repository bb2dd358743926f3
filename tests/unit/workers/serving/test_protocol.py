"""Bodies of requests: what templates get of them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from workers.serving.protocol import ChatRequest


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
    assistant, tool = (message.for_template() for message in request.messages)
    assert assistant["content"] == ""
    called = {"name": "visit", "arguments": {"city": "Oslo"}}
    assert assistant["tool_calls"] == [{**call, "function": called}]
    assert tool == {"role": "tool", "tool_call_id": "call_1", "content": "cold"}


@pytest.mark.parametrize(("arguments", "expected"), [({"a": 1}, {"a": 1}), (None, {}), ("", {})])
def test_arguments_may_be_objects_or_absent(arguments: object, expected: object) -> None:
    call = {"function": {"name": "visit", "arguments": arguments}}
    request = chat({"role": "assistant", "tool_calls": [call]})
    assert request.messages[0].for_template()["tool_calls"][0]["function"]["arguments"] == expected


def test_arguments_that_are_not_json_are_refused() -> None:
    call = {"function": {"name": "visit", "arguments": "{"}}
    with pytest.raises(ValidationError, match="the arguments are not JSON"):
        chat({"role": "assistant", "content": None, "tool_calls": [call]})
