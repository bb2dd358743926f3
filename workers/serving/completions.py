"""/v1/completions: responses and streams."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from workers.serving.answers import DONE, Reply, finite, shown
from workers.serving.protocol import CompletionRequest
from workers.serving.requests import Piece

OBJECT = "text_completion"


class TextChoice:
    """One choice, put together from its pieces; where its next text starts."""

    def __init__(self, reply: Reply, request: CompletionRequest, index: int) -> None:
        self.reply, self.request, self.index = reply, request, index
        prompt = reply.answer.prompts[index // (request.n or 1)]
        self.echo = reply.served.tokenization.decode(prompt) if request.echo else ""
        self.length = 0

    def part(self, piece: Piece) -> dict[str, Any]:
        """A piece as a choice of a chunk; the first one begins with the prompt if it shall be echoed."""
        text, self.echo = self.echo + piece.text, ""
        logprobs = None if self.request.logprobs is None else self.logprobs(piece)
        self.length += len(text)
        return {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    def logprobs(self, piece: Piece) -> dict[str, Any]:
        tokenization = self.reply.served.tokenization
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = self.length
        for choice in shown(self.reply.served, piece):
            text = tokenization.token_text(choice.token)
            found["tokens"].append(text)
            found["token_logprobs"].append(finite(choice.logprob))
            found["text_offset"].append(offset)
            # As OpenAI and vLLM: the token itself is among them, also beyond the number that was asked for.
            best = {tokenization.token_text(each.token): finite(each.logprob) for each in choice.top}
            found["top_logprobs"].append(best | {text: finite(choice.logprob)})
            offset += len(text)
        return found


async def respond(reply: Reply, request: CompletionRequest) -> dict[str, Any]:
    """The whole response. Raises the engine's error."""
    choices = [TextChoice(reply, request, index) for index in range(reply.answer.choices)]
    parts: list[list[dict[str, Any]]] = [[] for _ in choices]
    async for piece in reply.pieces():
        parts[piece.index].append(choices[piece.index].part(piece))
    return reply.envelope([joined(each) for each in parts]) | {"usage": reply.usage()}


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    whole = {**parts[-1], "text": "".join(part["text"] for part in parts)}
    if whole["logprobs"] is not None:
        whole["logprobs"] = {
            key: [value for part in parts for value in part["logprobs"][key]] for key in whole["logprobs"]
        }
    return whole


async def stream(reply: Reply, request: CompletionRequest) -> AsyncIterator[bytes]:
    """The frames of a stream."""
    choices = [TextChoice(reply, request, index) for index in range(reply.answer.choices)]
    async for piece in reply.pieces():
        yield reply.frame([choices[piece.index].part(piece)], OBJECT)
    if request.include_usage:
        yield reply.frame([], OBJECT)
    yield DONE
