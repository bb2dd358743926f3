"""anthropic: /v1/messages."""

from __future__ import annotations

from typing import Any

import anthropic
from rows import ABSENT, CITY, QUESTION, SCENE, TOO_LONG, WRONG_KEY, report, same

TOOL: Any = {"name": "visit", "description": "Visits.", "input_schema": CITY}
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
# The client itself takes no temperature any more.
GREEDY: Any = {"model": SCENE.model, "max_tokens": 80, "extra_body": {"temperature": 0}}


def client_with(key: str = SCENE.key) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=SCENE.url, api_key=key, max_retries=0, timeout=120)


client = client_with()


def chat() -> None:
    answer: Any = client.messages.create(messages=MESSAGES, system="Be brief.", **GREEDY)
    same([answer.content[0].text, answer.stop_reason], [SCENE.said, "end_turn"])
    counted = client.messages.count_tokens(model=SCENE.model, messages=MESSAGES, system="Be brief.")
    same(counted.input_tokens, answer.usage.input_tokens)


def stream() -> None:
    with client.messages.stream(messages=MESSAGES, **GREEDY) as events:
        same("".join(events.text_stream), SCENE.said)
        final = events.get_final_message()
    assert final.usage.output_tokens > 0
    same(final.stop_reason, "end_turn")


def calls(choice: Any) -> Any:
    """The first call, whole and streamed, which are the same."""
    asked: Any = {**GREEDY, "messages": MESSAGES, "tools": [TOOL], "tool_choice": choice}
    whole: Any = client.messages.create(**asked)
    with client.messages.stream(**asked) as events:
        streamed: Any = events.get_final_message()
    same([whole.stop_reason, streamed.stop_reason], ["tool_use", "tool_use"])
    call = next(each for each in whole.content if each.type == "tool_use")
    same(next(each.input for each in streamed.content if each.type == "tool_use"), call.input)
    return call


def tools_auto() -> None:
    call = calls({"type": "auto"})
    same({"name": call.name, "arguments": call.input}, SCENE.called)


def tools_required() -> None:
    assert calls({"type": "any", "disable_parallel_tool_use": True}).input["city"] in ("Rome", "Oslo")


def tools_named() -> None:
    assert calls({"type": "tool", "name": "visit"}).input["city"] in ("Rome", "Oslo")


def tool_results() -> None:
    first: Any = client.messages.create(messages=MESSAGES, tools=[TOOL], **GREEDY)
    call = next(each for each in first.content if each.type == "tool_use")
    history: Any = [
        *MESSAGES,
        {"role": "assistant", "content": [block.model_dump() for block in first.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "Sunny"}]},
    ]
    answer: Any = client.messages.create(messages=history, tools=[TOOL], **GREEDY)
    same(answer.content[0].text, SCENE.after)


def models() -> None:
    assert SCENE.model in [each.id for each in client.models.list()]


def unknown_model() -> None:
    client.messages.create(model=ABSENT, messages=MESSAGES, max_tokens=1)


def wrong_key() -> None:
    with client_with(WRONG_KEY) as stranger:
        stranger.messages.create(messages=MESSAGES, **GREEDY)


def too_long() -> None:
    client.messages.create(messages=[{"role": "user", "content": TOO_LONG}], **GREEDY)


report("anthropic", (anthropic.APIStatusError,), {
    "models": models, "chat": chat, "stream": stream, "tools: auto": tools_auto,
    "tools: required": tools_required, "tools: named": tools_named, "tool results": tool_results,
    "unknown model": unknown_model, "wrong key": wrong_key, "too long": too_long,
})  # fmt: skip
