"""/v1/chat/completions: responses and streams."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from workers.serving.answers import DONE, Reply, finite, shown
from workers.serving.protocol import ChatRequest, NamedTool
from workers.serving.requests import Choice, TextDelta
from workers.serving.served_model import ServedModel

CHUNK = "chat.completion.chunk"


class ChatChoice:
    """One choice of a response, put together from its deltas."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.text = ""
        self.logprobs: list[dict[str, Any]] = []
        self.last: TextDelta | None = None

    def add(self, delta: TextDelta, logprobs: list[dict[str, Any]]) -> None:
        self.text += delta.text
        self.logprobs += logprobs
        self.last = delta

    def body(self, request: ChatRequest) -> dict[str, Any]:
        assert self.last is not None
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None}
        reason: str | None = self.last.finish_reason
        call = tool_call(request, self.text)
        if call is not None:
            message |= {"content": None, "tool_calls": [call]}
            reason = called_reason(request, reason)
        return {
            "index": self.index,
            "message": message,
            "logprobs": {"content": self.logprobs} if request.logprobs else None,
            "finish_reason": reason,
            "stop_reason": self.last.stop_reason,
        }


async def respond(reply: Reply, request: ChatRequest) -> dict[str, Any]:
    """The whole response. Raises the engine's error."""
    choices = [ChatChoice(index) for index in range(reply.answer.choices)]
    async for delta in reply.deltas():
        choices[delta.index].add(delta, logprobs_of(reply.served, delta) if request.logprobs else [])
    body = reply.envelope([choice.body(request) for choice in choices])
    return body | {"usage": reply.usage(), "system_fingerprint": None}


async def stream(reply: Reply, request: ChatRequest) -> AsyncIterator[bytes]:
    """The frames of a stream. Nothing is sent before the first token is there."""
    started: set[int] = set()
    calls = {index: StreamedCall(request) for index in range(reply.answer.choices)}
    async for delta in reply.deltas():
        if not started:
            for index in calls:
                yield reply.frame([delta_choice(index, {"role": "assistant", "content": ""})], CHUNK)
            started.update(calls)
        logprobs = {"content": logprobs_of(reply.served, delta)} if request.logprobs else None
        for content in calls[delta.index].contents(delta):
            yield reply.frame([delta_choice(delta.index, content, logprobs)], CHUNK)
            logprobs = None
        if delta.finish_reason is not None:
            end = delta_choice(delta.index, {}, logprobs if logprobs and logprobs["content"] else None)
            reason = calls[delta.index].reason(delta.finish_reason)
            yield reply.frame([end | {"finish_reason": reason, "stop_reason": delta.stop_reason}], CHUNK)
    if request.include_usage:
        yield reply.frame([], CHUNK)
    yield DONE


class StreamedCall:
    """The deltas of one choice: text, or the tool call that tool_choice demands."""

    def __init__(self, request: ChatRequest) -> None:
        self.request = request
        self.text = ""
        self.id = f"call_{uuid.uuid4().hex}"
        self.named = request.tool_choice if isinstance(request.tool_choice, NamedTool) else None
        self.begun = self.called = False

    def contents(self, delta: TextDelta) -> list[dict[str, Any]]:
        if self.named is not None:
            return self.arguments(self.named.function.name, delta.text)
        if self.request.tool_choice != "required":
            return [{"content": delta.text}] if delta.text else []
        self.text += delta.text
        if delta.finish_reason is None:
            return []
        call = tool_call(self.request, self.text)
        if call is None:
            return [{"content": self.text}] if self.text else []
        self.called = True
        return [{"tool_calls": [{"index": 0, **call}]}]

    def arguments(self, name: str, text: str) -> list[dict[str, Any]]:
        self.called = True
        call: dict[str, Any] = {"index": 0, "function": {"arguments": text}}
        if not self.begun:
            self.begun = True
            call |= {"id": self.id, "type": "function", "function": {"name": name, "arguments": text}}
            return [{"tool_calls": [call]}]
        return [{"tool_calls": [call]}] if text else []

    def reason(self, reason: str) -> str | None:
        return called_reason(self.request, reason) if self.called else reason


def delta_choice(
    index: int, content: dict[str, Any], logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": content, "logprobs": logprobs, "finish_reason": None}


def tool_call(request: ChatRequest, text: str) -> dict[str, Any] | None:
    """The call that tool_choice demanded; None if there was no such demand, or the text broke off."""
    if isinstance(request.tool_choice, NamedTool):
        name, arguments = request.tool_choice.function.name, text
    elif request.tool_choice == "required":
        try:
            called = json.loads(text)
        except ValueError:
            return None
        name, arguments = called["name"], json.dumps(called["arguments"], ensure_ascii=False)
    else:
        return None
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def called_reason(request: ChatRequest, reason: str | None) -> str | None:
    """As OpenAI: a call that the model was free to choose ends with tool_calls, a named one with stop."""
    return "tool_calls" if reason == "stop" and request.tool_choice == "required" else reason


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
