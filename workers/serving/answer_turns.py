"""An answer in a conversation, as all routes of conversations take it: events while it grows, the whole."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from workers.serving.answer_readers import (
    AnswerReader,
    ArgumentsAdded,
    CallBegun,
    Event,
)
from workers.serving.answers import Reply
from workers.serving.protocol import ChatRequest
from workers.serving.requests import TextDelta


@dataclass
class AnsweredCall:
    id: str
    name: str
    arguments: str = ""


@dataclass
class Turn:
    """One choice of an answer, as far as it has come."""

    index: int
    reader: AnswerReader
    with_reasoning: bool = True
    content: str = ""
    reasoning: str = ""
    calls: list[AnsweredCall] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None  # why it ended, in OpenAI's words
    stop_reason: int | str | None = None

    def read(self, delta: TextDelta) -> list[Event]:
        """Takes a delta in; the events that it brings."""
        self.tokens += [choice.token for choice in delta.choices]
        last = delta.finish_reason is not None
        events = [event for event in self.reader.read(delta.text, last=last) if self._take(event)]
        if last:
            called = self.reader.called and delta.finish_reason == "stop"
            self.reason = "tool_calls" if called else delta.finish_reason
            self.stop_reason = delta.stop_reason
        return events

    def _take(self, event: Event) -> bool:
        """Whether callers hear of it."""
        if isinstance(event, CallBegun):
            self.calls.append(AnsweredCall(event.id, event.name))
        elif isinstance(event, ArgumentsAdded):
            self.calls[event.index].arguments += event.text
        elif event.kind == "content":
            self.content += event.text
        elif self.with_reasoning:
            self.reasoning += event.text
        else:
            return False
        return True


async def turns(reply: Reply, request: ChatRequest) -> AsyncIterator[tuple[TextDelta, Turn, list[Event]]]:
    """Each delta with its choice and the events that it brings. Raises the engine's error."""
    growing = [
        Turn(index, reply.answer.reader(), request.include_reasoning) for index in range(reply.answer.choices)
    ]
    async for delta in reply.deltas():
        turn = growing[delta.index]
        yield delta, turn, turn.read(delta)
