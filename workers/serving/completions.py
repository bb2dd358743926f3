"""/v1/completions: responses and streams."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from workers.serving.answers import DONE, Reply, finite, shown
from workers.serving.protocol import CompletionRequest
from workers.serving.requests import TextDelta

OBJECT = "text_completion"


class TextChoice:
    """One choice, put together from its deltas; `length` is where its next text starts."""

    def __init__(self, reply: Reply, request: CompletionRequest, index: int) -> None:
        self.reply, self.request, self.index = reply, request, index
        prompt = reply.answer.prompts[index // (request.n or 1)]
        self.echo = reply.served.tokenization.decode(prompt) if request.echo else ""
        self.length = 0

    def chunk_choice(self, delta: TextDelta) -> dict[str, Any]:
        """A delta as a choice of a chunk; the first one begins with the prompt if `echo` asks for it."""
        text, self.echo = self.echo + delta.text, ""
        logprobs = None if self.request.logprobs is None else self.logprobs(delta)
        self.length += len(text)
        return {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def logprobs(self, delta: TextDelta) -> dict[str, Any]:
        tokenization = self.reply.served.tokenization
        logprobs: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = self.length
        for choice in shown(self.reply.served, delta):
            text = tokenization.token_text(choice.token)
            logprobs["tokens"].append(text)
            logprobs["token_logprobs"].append(finite(choice.logprob))
            logprobs["text_offset"].append(offset)
            # As OpenAI and vLLM: the token itself is among them, also beyond the number that was asked for.
            best = {tokenization.token_text(each.token): finite(each.logprob) for each in choice.top}
            logprobs["top_logprobs"].append(best | {text: finite(choice.logprob)})
            offset += len(text)
        return logprobs


async def respond(reply: Reply, request: CompletionRequest) -> dict[str, Any]:
    """The whole response. Raises the engine's error."""
    choices = [TextChoice(reply, request, index) for index in range(reply.answer.choices)]
    parts: list[list[dict[str, Any]]] = [[] for _ in choices]
    async for delta in reply.deltas():
        parts[delta.index].append(choices[delta.index].chunk_choice(delta))
    return reply.envelope([joined(each) for each in parts]) | {"usage": reply.usage()}


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    whole = {**parts[-1], "text": "".join(choice["text"] for choice in parts)}
    if whole["logprobs"] is not None:
        whole["logprobs"] = {
            key: [value for choice in parts for value in choice["logprobs"][key]] for key in whole["logprobs"]
        }
    return whole


async def stream(reply: Reply, request: CompletionRequest) -> AsyncIterator[bytes]:
    """The frames of a stream."""
    choices = [TextChoice(reply, request, index) for index in range(reply.answer.choices)]
    async for delta in reply.deltas():
        yield reply.frame([choices[delta.index].chunk_choice(delta)], OBJECT)
    if request.include_usage:
        yield reply.frame([], OBJECT)
    yield DONE
