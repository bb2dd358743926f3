"""What chat and text completions share: identity, usage, frames of event streams, logprobs."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

from workers.serving.protocol import Body
from workers.serving.requests import Choice, Piece
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

    def frame(self, choices: list[dict[str, Any]], chunk: str) -> bytes:
        """A chunk of a stream."""
        content = self.envelope(choices, chunk=chunk)
        if self.request.continuous_usage or (self.request.include_usage and not choices):
            content["usage"] = self.usage()
        elif self.request.include_usage:
            content["usage"] = None
        return event(content)

    async def pieces(self) -> AsyncIterator[Piece]:
        """What the engine makes, counted. Raises its error."""
        async for piece in self.answer.pieces():
            self.completion_tokens += len(piece.choices)
            if piece.error is not None:
                raise piece.error
            yield piece


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def shown(served: ServedModel, piece: Piece) -> Iterable[Choice]:
    """The choices behind a piece's text: without the token that ended it."""
    ended = piece.finish_reason == "stop" and piece.stop_reason is None
    last = len(piece.choices) - 1
    for place, choice in enumerate(piece.choices):
        if not (ended and place == last and choice.token in served.tokenization.end_tokens):
            yield choice


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
