"""/v1/messages: answers and streams in Anthropic's form, from the same events as a chat's."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from app.core.errors import NibbleError
from app.core.faults.error_answers import inference_answer
from workers.serving.answer_readers import ArgumentsAdded, CallBegun, Event
from workers.serving.answer_turns import Turn, turns
from workers.serving.answers import Reply, event
from workers.serving.protocol import ChatRequest

PATH = "/v1/messages"
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
Document = dict[str, Any]


@dataclass
class MessageBlocks:
    """The blocks of an answer as they grow, and what a stream says of it."""

    content: list[Document] = field(default_factory=list)
    _arguments: str = ""  # of the block that is open
    _open: bool = False

    def take(self, event: Event) -> Iterator[Document]:
        if isinstance(event, CallBegun):
            yield from self.close()
            yield from self._begin({"type": "tool_use", "id": event.id, "name": event.name, "input": {}})
        elif isinstance(event, ArgumentsAdded):
            self._arguments += event.text
            yield self._delta({"type": "input_json_delta", "partial_json": event.text})
        else:
            name = "text" if event.kind == "content" else "thinking"
            if not self._open or self.content[-1]["type"] != name:
                yield from self.close()
                yield from self._begin(
                    {"type": name, name: ""} | ({} if name == "text" else {"signature": ""})
                )
            self.content[-1][name] += event.text
            yield self._delta({"type": f"{name}_delta", name: event.text})

    def close(self) -> Iterator[Document]:
        """Ends the block that is open; the arguments of a call that broke off stay empty."""
        if not self._open:
            return
        self._open = False
        if self.content[-1]["type"] == "tool_use":
            try:
                self.content[-1]["input"] = json.loads(self._arguments or "{}")
            except ValueError:
                self.content[-1]["input"] = {}
        yield {"type": "content_block_stop", "index": len(self.content) - 1}

    def _begin(self, block: Document) -> Iterator[Document]:
        self.content.append(block)
        self._open, self._arguments = True, ""
        yield {"type": "content_block_start", "index": len(self.content) - 1, "content_block": dict(block)}

    def _delta(self, delta: Document) -> Document:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}


async def documents(reply: Reply, chat: ChatRequest) -> AsyncIterator[Document]:
    """All that a stream says, and then the whole message. Raises the engine's error."""
    blocks, ended = MessageBlocks(), None
    begun = False
    async for delta, turn, events in turns(reply, chat):
        if not begun:
            begun = True
            yield {"type": "message_start", "message": message(reply, [], None)}
        for each in events:
            for document in blocks.take(each):
                yield document
        if delta.finish_reason is not None:
            ended = turn
    assert ended is not None
    for document in blocks.close():
        yield document
    whole = message(reply, blocks.content, ended)
    end = {"stop_reason": whole["stop_reason"], "stop_sequence": whole["stop_sequence"]}
    yield {"type": "message_delta", "delta": end, "usage": whole["usage"]}
    yield {"type": "message_stop"}
    yield whole


async def respond(reply: Reply, chat: ChatRequest) -> Document:
    """The whole message. Raises the engine's error."""
    last: Document = {}
    async for document in documents(reply, chat):
        last = document
    return last


async def stream(reply: Reply, chat: ChatRequest) -> AsyncIterator[bytes]:
    """The frames of a stream; an error in the midst of it is its last event."""
    begun = False
    try:
        async for document in documents(reply, chat):
            if document["type"] != "message":
                yield event(document, name=document["type"])
            begun = True
    except NibbleError as error:
        if not begun:
            raise
        yield event(inference_answer(error, path=PATH).body, name="error")


def message(reply: Reply, content: list[Document], ended: Turn | None) -> Document:
    return {
        "id": f"msg_{reply.number}",
        "type": "message",
        "role": "assistant",
        "model": reply.served.name,
        "content": content,
        "stop_reason": None if ended is None else stop_reason(ended),
        "stop_sequence": ended.stop_reason if ended and isinstance(ended.stop_reason, str) else None,
        "usage": {
            "input_tokens": reply.answer.prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": reply.completion_tokens,
        },
    }


def stop_reason(ended: Turn) -> str:
    """A call that the request names counts as one here."""
    if ended.calls and ended.reason != "length":
        return "tool_use"
    if isinstance(ended.stop_reason, str):
        return "stop_sequence"
    return REASONS.get(ended.reason or "stop", "end_turn")
