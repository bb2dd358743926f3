"""/v1/chat/completions: responses and streams."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from workers.serving.answer_readers import ArgumentsAdded, CallBegun, Event
from workers.serving.answer_turns import Turn, turns
from workers.serving.answers import DONE, Reply, finite, prompt_scores, shown
from workers.serving.protocol import ChatRequest
from workers.serving.requests import Choice, TextDelta
from workers.serving.served_model import ServedModel

CHUNK = "chat.completion.chunk"


async def respond(reply: Reply, request: ChatRequest) -> dict[str, Any]:
    """The whole response. Raises the engine's error."""
    logprobs: list[list[dict[str, Any]]] = [[] for _ in range(reply.answer.choices)]
    ended: list[Turn] = []
    scored: TextDelta | None = None
    async for delta, turn, _events in turns(reply, request):
        if request.logprobs:
            logprobs[turn.index] += logprobs_of(reply.served, delta)
        if delta.prompt_scores is not None:
            scored = delta
        if delta.finish_reason is not None:
            ended.append(turn)
    ended.sort(key=lambda turn: turn.index)
    choices = [whole_choice(turn, request, logprobs[turn.index]) for turn in ended]
    body = reply.envelope(choices) | {"usage": reply.usage(), "system_fingerprint": None}
    prompt = reply.answer.prompts[0]
    if scored is not None and request.prompt_logprobs is not None:
        body["prompt_logprobs"] = prompt_scores(reply.served, prompt, scored, request.prompt_logprobs)
    if request.return_token_ids:
        body["prompt_token_ids"] = list(prompt)
    return body


def whole_choice(turn: Turn, request: ChatRequest, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": turn.content, "refusal": None}
    if turn.calls:
        calls = [call_object(call.id, call.name, call.arguments) for call in turn.calls]
        message |= {"content": turn.content or None, "tool_calls": calls}
    if turn.reasoning:
        message |= reasoning_fields(turn.reasoning)
    choice = {
        "index": turn.index,
        "message": message,
        "logprobs": {"content": logprobs} if request.logprobs else None,
        "finish_reason": turn.reason,
        "stop_reason": turn.stop_reason,
    }
    return choice | ({"token_ids": turn.tokens} if request.return_token_ids else {})


async def stream(reply: Reply, request: ChatRequest) -> AsyncIterator[bytes]:
    """The frames of a stream. Nothing is sent before the first token is there."""
    begun = False
    async for delta, turn, events in turns(reply, request):
        if not begun:
            begun = True
            for index in range(reply.answer.choices):
                first = delta_choice(index, {"role": "assistant", "content": ""})
                more = {"prompt_token_ids": list(reply.answer.prompts[0])} if request.return_token_ids else {}
                yield reply.frame([first], CHUNK, more)
        logprobs = {"content": logprobs_of(reply.served, delta)} if request.logprobs else None
        tokens = {"token_ids": [each.token for each in delta.choices]} if request.return_token_ids else {}
        for content in map(delta_of, events):
            yield reply.frame([delta_choice(turn.index, content, logprobs) | tokens], CHUNK)
            logprobs, tokens = None, {}
        if delta.finish_reason is not None:
            end = delta_choice(turn.index, {}, logprobs if logprobs and logprobs["content"] else None)
            ending = {"finish_reason": turn.reason, "stop_reason": turn.stop_reason}
            yield reply.frame([end | tokens | ending], CHUNK)
        elif not events and (tokens.get("token_ids") or (logprobs and logprobs["content"])):
            # Its text is held back, and what it was drawn from is not.
            yield reply.frame([delta_choice(turn.index, {}, logprobs) | tokens], CHUNK)
    if request.include_usage:
        yield reply.frame([], CHUNK)
    yield DONE


def delta_of(event: Event) -> dict[str, Any]:
    """An event as OpenAI's delta."""
    if isinstance(event, CallBegun):
        return {"tool_calls": [{"index": event.index, **call_object(event.id, event.name, "")}]}
    if isinstance(event, ArgumentsAdded):
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
    return {"content": event.text} if event.kind == "content" else reasoning_fields(event.text)


def reasoning_fields(text: str) -> dict[str, Any]:
    """Under both names that clients read: vLLM's present one, and DeepSeek's, which was vLLM's before."""
    return {"reasoning": text, "reasoning_content": text}


def call_object(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def delta_choice(
    index: int, content: dict[str, Any], logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": content, "logprobs": logprobs, "finish_reason": None}


def logprobs_of(served: ServedModel, delta: TextDelta) -> list[dict[str, Any]]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": served.tokenization.token_text(token),
            "logprob": finite(logprob),
            "bytes": list(served.tokenization.token_bytes(token)),
        }

    def whole(choice: Choice) -> dict[str, Any]:
        top = [entry(each.token, each.logprob) for each in choice.top]
        return entry(choice.token, choice.logprob) | {"top_logprobs": top}

    return [whole(choice) for choice in shown(served, delta)]
