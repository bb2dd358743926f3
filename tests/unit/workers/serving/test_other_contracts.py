"""/v1/responses and /v1/messages as translations: what a body becomes, and what an answer's events become."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from app.core.errors import InvalidRequest
from tests.inference import Served
from tests.tiny_models import random_model, save_model
from workers.serving.answer_readers import ArgumentsAdded, CallBegun, Event, TextAdded
from workers.serving.messages import MessageBlocks
from workers.serving.messages_body import MessagesRequest
from workers.serving.responses import ResponseItems
from workers.serving.responses_body import ResponsesRequest
from workers.serving.routes import create_app

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
}
ALL_KINDS: list[Event] = [
    TextAdded("reasoning", "Hm."), TextAdded("content", "It"), TextAdded("content", " is"),
    CallBegun(0, "call_1", "visit"), ArgumentsAdded(0, '{"city"'), ArgumentsAdded(0, ': "Oslo"}'),
    CallBegun(1, "call_2", "stay"), ArgumentsAdded(1, "{}"),
]  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(save_model(random_model("llama"), tmp_path_factory.mktemp("model")))


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; each is named as its type."""
    frames = [frame.split("\n") for frame in answer.text.strip().split("\n\n")]
    documents = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [name.removeprefix("event: ") for name, _ in frames] == [each["type"] for each in documents]
    return documents


def test_an_input_of_items_is_a_conversation() -> None:
    body = {
        "instructions": "Be short.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Where?"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
            {"type": "function_call", "call_id": "c1", "name": "find", "arguments": '{"a": 1}'},
            {"type": "function_call", "call_id": "c2", "name": "find", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "Oslo"},
        ],
        "tools": [{"type": "function", "name": "find", "parameters": CITY, "strict": True}],
        "tool_choice": {
            "type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "find"}]
        },
        "text": {"format": {"type": "json_schema", "name": "x", "schema": CITY, "strict": True}},
        "max_output_tokens": 5, "reasoning": {"effort": "low"}, "include": ["message.output_text.logprobs"],
    }  # fmt: skip
    chat = ResponsesRequest.model_validate(body).to_chat()
    messages = [message.model_dump(exclude_unset=True) for message in chat.messages]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool"]
    assistant = messages[2]
    assert assistant["reasoning_content"] == "Hm."
    assert assistant["content"] == [{"type": "text", "text": "I look."}]
    assert [call["id"] for call in assistant["tool_calls"]] == ["c1", "c2"]
    assert messages[3] == {"role": "tool", "tool_call_id": "c1", "content": "Oslo"}
    assert chat.offered[0].function.strict is True
    assert chat.choice_of_calls == "required"
    assert (chat.max_completion_tokens, chat.reasoning_effort, chat.logprobs) == (5, "low", True)
    assert chat.response_format is not None
    assert chat.response_format.json_schema is not None
    assert chat.response_format.json_schema.strict is True


def test_blocks_are_a_conversation() -> None:
    body = {
        "max_tokens": 7, "system": [{"type": "text", "text": "Be short."}], "stop_sequences": ["END"],
        "messages": [
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "find", "input": {"a": 1}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "Oslo"}]},
                {"type": "text", "text": "And now?"},
            ]},
        ],
        "tools": [{"name": "find", "description": "d", "input_schema": CITY}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "thinking": {"type": "disabled"},
    }  # fmt: skip
    chat = MessagesRequest.model_validate(body).to_chat()
    messages = [message.model_dump(exclude_unset=True) for message in chat.messages]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "user"]
    assert messages[2]["reasoning_content"] == "Hm."
    assert messages[2]["tool_calls"][0]["function"] == {"name": "find", "arguments": '{"a": 1}'}
    assert messages[3]["tool_call_id"] == "t1"
    assert messages[3]["content"] == [{"type": "text", "text": "Oslo"}]
    assert (chat.max_completion_tokens, chat.stop, chat.parallel_tool_calls) == (7, ["END"], False)
    assert chat.choice_of_calls == "required"
    assert chat.chat_template_kwargs is not None
    assert chat.chat_template_kwargs["enable_thinking"] is False


def test_a_last_turn_of_the_assistant_is_continued() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am"}]
    chat = MessagesRequest.model_validate({"max_tokens": 3, "messages": messages}).to_chat()
    assert chat.continue_final_message
    assert not chat.add_generation_prompt


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"include": ["file_search_call.results"]}, "include"),
    ],
)
def test_what_responses_do_not_hold_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        ResponsesRequest.model_validate({"input": "Hi", **fields}).to_chat()
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mcp_servers": [{"url": "http://a"}]}, "mcp_servers"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0.type"),
    ],
)
def test_what_messages_do_not_hold_is_refused(fields: dict[str, Any], param: str) -> None:
    body = {"max_tokens": 3, "messages": [{"role": "user", "content": "Hi"}], **fields}
    with pytest.raises(InvalidRequest) as refusal:
        MessagesRequest.model_validate(body).to_chat()
    assert refusal.value.param == param


def test_events_become_items() -> None:
    """Each item is added, grows and is done, in turn; the text of the deltas is the item's."""
    items = ResponseItems()
    documents = [each for event in ALL_KINDS for each in items.take(event, [])]
    documents += items.close()
    assert [item["type"] for item in items.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert items.output[0]["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert items.output[1]["content"][0]["text"] == "It is"
    assert items.output[2]["arguments"] == '{"city": "Oslo"}'
    assert all(item["status"] == "completed" for item in items.output)
    for index, item in enumerate(items.output):
        own = [each for each in documents if each["output_index"] == index]
        assert own[0]["type"] == "response.output_item.added"
        assert own[0]["item"]["status"] == "in_progress"
        assert own[-1] == {"type": "response.output_item.done", "output_index": index, "item": item}


def test_events_become_blocks() -> None:
    blocks = MessageBlocks()
    documents = [each for event in ALL_KINDS for each in blocks.take(event)] + list(blocks.close())
    assert blocks.content == [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "It is"},
        {"type": "tool_use", "id": "call_1", "name": "visit", "input": {"city": "Oslo"}},
        {"type": "tool_use", "id": "call_2", "name": "stay", "input": {}},
    ]
    for index in range(4):
        own = [each["type"] for each in documents if each["index"] == index]
        assert (own[0], own[-1]) == ("content_block_start", "content_block_stop")
        assert set(own[1:-1]) == {"content_block_delta"}


def test_a_response_whole_and_streamed(served: Served) -> None:
    body = {"input": "Say something", "max_output_tokens": 6, "temperature": 0}
    whole = served.post("/v1/responses", body).json()
    chat = {"messages": [{"role": "user", "content": "Say something"}], "max_tokens": 6, "temperature": 0}
    text = served.post("/v1/chat/completions", chat).json()["choices"][0]["message"]["content"]
    assert (whole["object"], whole["status"]) == ("response", "incomplete")
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["output"][0]["content"][0]["text"] == text
    assert whole["usage"]["output_tokens"] == 6
    events = events_of(served.post("/v1/responses", {**body, "stream": True}))
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    deltas = [each["delta"] for each in events if each["type"] == "response.output_text.delta"]
    assert "".join(deltas) == text
    assert events[0]["type"] == "response.created"
    last = events[-1]["response"]
    assert last["output"][0]["content"] == whole["output"][0]["content"]
    assert last["usage"] == whole["usage"]


def test_a_message_whole_and_streamed(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "Say something"}], "max_tokens": 6, "temperature": 0}
    whole = served.post("/v1/messages", body).json()
    text = served.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert whole["content"] == [{"type": "text", "text": text}]
    assert (whole["stop_reason"], whole["usage"]["output_tokens"]) == ("max_tokens", 6)
    counted = served.post("/v1/messages/count_tokens", {"messages": body["messages"]}).json()
    assert counted == {"input_tokens": whole["usage"]["input_tokens"]}
    events = events_of(served.post("/v1/messages", {**body, "stream": True}))
    assert [events[0]["type"], events[-1]["type"]] == ["message_start", "message_stop"]
    deltas = [each["delta"]["text"] for each in events if each["type"] == "content_block_delta"]
    assert "".join(deltas) == text
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called(served: Served, stream: bool) -> None:
    tool = {"name": "visit", "description": "d", "input_schema": CITY}
    body = {
        "messages": [{"role": "user", "content": "Go"}], "max_tokens": 60, "temperature": 0, "tools": [tool],
        "tool_choice": {"type": "tool", "name": "visit"},
    }  # fmt: skip
    answer = served.post("/v1/messages", {**body, "stream": stream})
    if stream:
        events = events_of(answer)
        json_text = "".join(e["delta"]["partial_json"] for e in events if e["type"] == "content_block_delta")
        called, reason = json.loads(json_text), events[-2]["delta"]["stop_reason"]
    else:
        called, reason = answer.json()["content"][0]["input"], answer.json()["stop_reason"]
    assert called["city"] in ("Rome", "Oslo")
    assert reason == "tool_use"
    function = {"type": "function", "name": "visit", "parameters": CITY}
    asked = {"input": "Go", "tools": [function], "tool_choice": {"type": "function", "name": "visit"}}
    response = served.post("/v1/responses", {**asked, "temperature": 0}).json()
    assert json.loads(response["output"][0]["arguments"])["city"] in ("Rome", "Oslo")


def test_errors_have_the_shape_of_their_contract(served: Served) -> None:
    answer = served.post("/v1/messages", {"max_tokens": 0, "messages": [{"role": "user", "content": "Hi"}]})
    assert answer.status_code == 400
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert "max_tokens" in answer.json()["error"]["message"]
    unknown = served.post(
        "/v1/messages",
        {"model": "x", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]},
    )
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")
    refused = served.post("/v1/responses", {"input": "a", "temperature": -1})
    assert refused.json()["error"]["param"] == "temperature"
    embeddings = served.post("/v1/embeddings", {"model": "tiny", "input": "a"})
    assert embeddings.json()["error"]["code"] == "embeddings_not_supported"


def test_tokens_of_texts_and_conversations(served: Served) -> None:
    text = "The city of the north"
    answer = served.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == served.tokenization.encode(text, special_tokens=True)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == served.limits.max_model_len
    back = served.post("/detokenize", {"tokens": answer["tokens"]}).json()
    assert text in back["prompt"]
    messages = [{"role": "user", "content": "Hi"}]
    chat = served.post("/tokenize", {"messages": messages}).json()
    usage = served.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1}).json()["usage"]
    assert chat["count"] == usage["prompt_tokens"]
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {"tokens": [10**6]}),
    ):
        assert served.post(path, body).status_code == 400


def test_probes_of_other_servers_find_their_paths(served: Served) -> None:
    async def run() -> list[int]:
        transport = httpx.ASGITransport(create_app(served.served))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            answers = [await client.get(path) for path in ("/health", "/ping", "/version")]
            return [answer.status_code for answer in [*answers, await client.post("/ping")]]

    assert asyncio.run(run()) == [200, 200, 200, 200]
