"""litellm: the ways in which it names servers of OpenAI's contract, and its errors."""

from __future__ import annotations

import json
from typing import Any

import litellm
from rows import ABSENT, CITY, QUESTION, SCENE, TOO_LONG, WRONG_KEY, report, same

TOOL: Any = {"type": "function", "function": {"name": "visit", "parameters": CITY}}
FUNCTION: Any = {"type": "function", "name": "visit", "parameters": CITY}
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
OPTIONS: Any = {"api_base": SCENE.base, "api_key": SCENE.key, "max_retries": 0}
GREEDY: Any = {"model": f"openai/{SCENE.model}", "temperature": 0, **OPTIONS}
REFUSALS = (
    litellm.AuthenticationError, litellm.BadRequestError, litellm.NotFoundError,
    litellm.ContextWindowExceededError,
)  # fmt: skip


def chat() -> None:
    for way in ("openai", "hosted_vllm", "custom_openai", "lm_studio"):
        answer: Any = litellm.completion(messages=MESSAGES, **{**GREEDY, "model": f"{way}/{SCENE.model}"})
        same(answer.choices[0].message.content, SCENE.said)
        assert answer.usage.completion_tokens > 0


def stream() -> None:
    chunks: Any = litellm.completion(messages=MESSAGES, stream=True, **GREEDY)
    same("".join(each.choices[0].delta.content or "" for each in chunks), SCENE.said)


async def from_event_loop() -> None:
    answer: Any = await litellm.acompletion(messages=MESSAGES, **GREEDY)
    same(answer.choices[0].message.content, SCENE.said)


def completions() -> None:
    asked = {**GREEDY, "model": f"text-completion-openai/{SCENE.model}", "max_tokens": 30}
    same(litellm.text_completion(prompt="Say:", **asked).choices[0].text.strip(), SCENE.said)


def calls(choice: Any) -> Any:
    asked: Any = {"messages": MESSAGES, "tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    return litellm.completion(**asked, **GREEDY).choices[0].message.tool_calls[0].function


def tools_auto() -> None:
    call = calls("auto")
    same({"name": call.name, "arguments": json.loads(call.arguments)}, SCENE.called)


def tools_required() -> None:
    assert json.loads(calls("required").arguments)["city"] in ("Rome", "Oslo")


def tools_named() -> None:
    named = {"type": "function", "function": {"name": "visit"}}
    assert json.loads(calls(named).arguments)["city"] in ("Rome", "Oslo")


def tool_results() -> None:
    first: Any = litellm.completion(messages=MESSAGES, tools=[TOOL], **GREEDY).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "Sunny"}
    answer: Any = litellm.completion(messages=[*MESSAGES, first, result], tools=[TOOL], **GREEDY)
    same(answer.choices[0].message.content, SCENE.after)


def structured() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    answer: Any = litellm.completion(messages=MESSAGES, response_format=form, **GREEDY)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Rome", "Oslo")


def responses() -> None:
    answer: Any = litellm.responses(input=QUESTION, **GREEDY)
    same(answer.output[0].content[0].text, SCENE.said)


def responses_tools() -> None:
    answer: Any = litellm.responses(input=QUESTION, tools=[FUNCTION], **GREEDY)
    (item,) = [each for each in answer.output if each.type == "function_call"]
    same({"name": item.name, "arguments": json.loads(item.arguments)}, SCENE.called)


def messages() -> None:
    """Anthropic's contract, through litellm."""
    asked: Any = {"model": f"anthropic/{SCENE.model}", "api_base": SCENE.url, "api_key": SCENE.key}
    answer: Any = litellm.completion(messages=MESSAGES, max_tokens=60, temperature=0, **asked)
    same(answer.choices[0].message.content, SCENE.said)


def embeddings() -> None:
    litellm.embedding(input=["a"], model=f"openai/{SCENE.model}", **OPTIONS)


def unknown_model() -> None:
    litellm.completion(messages=MESSAGES, **{**GREEDY, "model": f"openai/{ABSENT}"})


def wrong_key() -> None:
    litellm.completion(messages=MESSAGES, **{**GREEDY, "api_key": WRONG_KEY})


def too_long() -> None:
    litellm.completion(messages=[{"role": "user", "content": TOO_LONG}], **GREEDY)


report("litellm", REFUSALS, {
    "chat": chat, "stream": stream, "event loop": from_event_loop, "completions": completions,
    "tools: auto": tools_auto, "tools: required": tools_required, "tools: named": tools_named,
    "tool results": tool_results, "structured": structured, "responses": responses,
    "responses: tools": responses_tools, "messages": messages, "embeddings": embeddings,
    "unknown model": unknown_model, "wrong key": wrong_key, "too long": too_long,
})  # fmt: skip
