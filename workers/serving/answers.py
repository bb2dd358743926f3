"""Common to chat and text completions: identity, usage, frames of event streams, logprobs."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

from workers.serving.protocol import Body
from workers.serving.requests import Choice, TextDelta
from workers.serving.served_model import Answer, ServedModel

DONE = b"data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass
class Reply:
    """One response under way."""

    served: ServedModel
    request: Body
    answer: Answer
    prefix: str  # of the id
    kind: str  # the `object` of the response
    completion_tokens: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: uuid.uuid4().hex)

    def envelope(self, choices: list[dict[str, Any]], *, chunk: str = "") -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.number}",
            "object": chunk or self.kind,
            "created": self.created,
            "model": self.served.name,
            "choices": choices,
        }

    def usage(self) -> dict[str, Any]:
        prompt, completion = self.answer.prompt_tokens, self.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def frame(self, choices: list[dict[str, Any]], chunk: str, more: dict[str, Any] | None = None) -> bytes:
        """A chunk of a stream."""
        content = self.envelope(choices, chunk=chunk) | (more or {})
        if self.request.continuous_usage or (self.request.include_usage and not choices):
            content["usage"] = self.usage()
        elif self.request.include_usage:
            content["usage"] = None
        return event(content)

    async def deltas(self) -> AsyncIterator[TextDelta]:
        """The engine's deltas; counts their tokens. Raises the engine's error."""
        async for delta in self.answer.deltas():
            self.completion_tokens += len(delta.choices)
            if delta.error is not None:
                raise delta.error
            yield delta


def event(content: dict[str, Any], name: str = "") -> bytes:
    """A frame of an event stream; OpenAI's older routes give events no name."""
    head = f"event: {name}\n".encode() if name else b""
    return (
        head + b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


def shown(served: ServedModel, delta: TextDelta) -> Iterable[Choice]:
    """The tokens of a delta's text, without the one that ended it."""
    ended = delta.finish_reason == "stop" and delta.stop_reason is None
    last = len(delta.choices) - 1
    for index, choice in enumerate(delta.choices):
        if not (ended and index == last and choice.token in served.tokenization.end_tokens):
            yield choice


def prompt_scores(
    served: ServedModel, prompt: tuple[int, ...], delta: TextDelta, top: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: by token id, the token itself and the best ones; null for the first."""

    def entry(token: int, logprob: float, rank: int) -> dict[str, Any]:
        text = served.tokenization.token_text(token)
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": text}

    scores: list[dict[str, Any] | None] = [None] if prompt else []
    for score in delta.prompt_scores or ():
        best = {str(each.token): entry(each.token, each.logprob, rank)
                for rank, each in enumerate(score.top[:top], 1)}  # fmt: skip
        scores.append({str(score.token): entry(score.token, score.logprob, score.rank)} | best)
    return scores


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
