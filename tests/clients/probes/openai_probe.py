"""openai, in two generations."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from pydantic import BaseModel
from rows import ABSENT, CITY, QUESTION, SCENE, TOO_LONG, WRONG_KEY, report, same

TOOL: Any = {"type": "function", "function": {"name": "visit", "parameters": CITY}}
FUNCTION: Any = {"type": "function", "name": "visit", "parameters": CITY, "strict": True}
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
GREEDY: Any = {"model": SCENE.model, "temperature": 0}


class City(BaseModel):
    city: Literal["Rome", "Oslo"]


def client_with(key: str = SCENE.key) -> openai.OpenAI:
    return openai.OpenAI(base_url=SCENE.base, api_key=key, max_retries=0, timeout=120)


client = client_with()
chats = client.chat.completions


def models() -> None:
    assert SCENE.model in [each.id for each in client.models.list()]
    same(client.models.retrieve(SCENE.model).id, SCENE.model)


def chat() -> None:
    answer = chats.create(messages=MESSAGES, **GREEDY)
    same(answer.choices[0].message.content, SCENE.said)
    same(answer.choices[0].finish_reason, "stop")


def stream() -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(chats.create(messages=MESSAGES, **GREEDY, **options))
    said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    same(said, SCENE.said)
    assert chunks[-1].usage.completion_tokens > 0


async def from_event_loop() -> None:
    options: Any = {"base_url": SCENE.base, "api_key": SCENE.key, "max_retries": 0}
    async with openai.AsyncOpenAI(**options) as other:
        chunks = [
            each
            async for each in await other.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY)
        ]
    same("".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices), SCENE.said)


def logprobs() -> None:
    answer = chats.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY)
    content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert len(content) >= answer.usage.completion_tokens - 1  # type: ignore[arg-type, union-attr]
    same(len(content[0].top_logprobs), 2)  # type: ignore[index]


def completions() -> None:
    answer = client.completions.create(prompt=["Say:", "Read the result:"], max_tokens=30, **GREEDY)
    same([each.text.strip() for each in answer.choices], [SCENE.said, SCENE.after])
    scored = client.completions.create(
        prompt=[[5, 6, 7], [8, 9]], max_tokens=0, echo=True, logprobs=1, **GREEDY
    )
    same([len(each.logprobs.token_logprobs) for each in scored.choices], [3, 2])  # type: ignore[union-attr, arg-type]


def calls(choice: Any, **options: Any) -> Any:
    """The first call, whole and streamed, which are the same."""
    asked = {**GREEDY, "messages": MESSAGES, "tools": [TOOL], "tool_choice": choice, **options}
    whole = chats.create(**asked).choices[0]
    call = whole.message.tool_calls[0].function
    with chats.stream(**asked) as events:
        streamed = events.get_final_completion().choices[0].message.tool_calls[0].function
    same([streamed.name, streamed.arguments], [call.name, call.arguments])
    return call


def tools_auto() -> None:
    call = calls("auto")
    same({"name": call.name, "arguments": json.loads(call.arguments)}, SCENE.called)


def tools_required() -> None:
    call = calls("required", parallel_tool_calls=False)
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOL]}}
    same(calls(allowed, parallel_tool_calls=False).name, "visit")


def tools_named() -> None:
    call = calls({"type": "function", "function": {"name": "visit"}})
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")


def tool_results() -> None:
    first = chats.create(messages=MESSAGES, tools=[TOOL], **GREEDY).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "Sunny"}  # type: ignore[index]
    answer = chats.create(messages=[*MESSAGES, first, result], tools=[TOOL], **GREEDY)
    same(answer.choices[0].message.content, SCENE.after)


def structured() -> None:
    answer = chats.parse(messages=MESSAGES, response_format=City, **GREEDY)
    assert isinstance(answer.choices[0].message.parsed, City)
    loose = chats.create(messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=40, **GREEDY)
    assert loose.choices[0].message.content.lstrip().startswith("{")  # type: ignore[union-attr]


def responses() -> None:
    answer = client.responses.create(input=QUESTION, **GREEDY)
    same([answer.output_text, answer.status], [SCENE.said, "completed"])
    with client.responses.stream(input=QUESTION, **GREEDY) as events:
        kinds = [event.type for event in events]
        same(events.get_final_response().output_text, SCENE.said)
    assert {"response.created", "response.output_text.delta", "response.completed"} <= set(kinds)
    parsed = client.responses.parse(input=QUESTION, text_format=City, **GREEDY)
    assert isinstance(parsed.output_parsed, City)


def responses_tools() -> None:
    called: Any = client.responses.create(input=QUESTION, tools=[FUNCTION], **GREEDY)
    (item,) = [each for each in called.output if each.type == "function_call"]
    same({"name": item.name, "arguments": json.loads(item.arguments)}, SCENE.called)
    result = {"type": "function_call_output", "call_id": item.call_id, "output": "Sunny"}
    history: Any = [{"role": "user", "content": QUESTION}, *called.output, result]
    same(client.responses.create(input=history, tools=[FUNCTION], **GREEDY).output_text, SCENE.after)


def embeddings() -> None:
    client.embeddings.create(model=SCENE.model, input="a")


def unknown_model() -> None:
    chats.create(model=ABSENT, messages=MESSAGES)


def wrong_key() -> None:
    with client_with(WRONG_KEY) as stranger:
        stranger.models.list()


def too_long() -> None:
    client.completions.create(prompt=TOO_LONG, **GREEDY)


report("openai", (openai.APIStatusError,), {
    "models": models, "chat": chat, "stream": stream, "event loop": from_event_loop, "logprobs": logprobs,
    "completions": completions, "tools: auto": tools_auto, "tools: required": tools_required,
    "tools: named": tools_named, "tool results": tool_results, "structured": structured,
    "responses": responses, "responses: tools": responses_tools, "embeddings": embeddings,
    "unknown model": unknown_model, "wrong key": wrong_key, "too long": too_long,
})  # fmt: skip
