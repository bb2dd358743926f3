"""/v1/responses: answers and streams in OpenAI's newer form, from the same events as a chat's."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from app.core.errors import NibbleError
from app.core.faults.error_answers import inference_answer
from workers.serving.answer_readers import ArgumentsAdded, CallBegun, Event
from workers.serving.answer_turns import Turn, turns
from workers.serving.answers import Reply, event
from workers.serving.chat_answers import logprobs_of
from workers.serving.protocol import ChatRequest
from workers.serving.responses_body import ResponsesRequest

INCOMPLETE = {"length": "max_output_tokens"}
Document = dict[str, Any]


@dataclass
class ResponseItems:
    """The items of an answer as they grow, and what a stream says of it."""

    output: list[Document] = field(default_factory=list)
    _open: Document | None = None

    def take(self, event: Event, logprobs: list[Document]) -> Iterator[Document]:
        if isinstance(event, CallBegun):
            yield from self.close()
            yield from self._begin("function_call", "fc", call_id=event.id, name=event.name, arguments="")
        elif isinstance(event, ArgumentsAdded):
            assert self._open is not None
            self._open["arguments"] += event.text
            yield {"type": "response.function_call_arguments.delta", **self._place(), "delta": event.text}
        else:
            yield from self._text(event.kind, event.text, logprobs)

    def _text(self, kind: str, text: str, logprobs: list[Document]) -> Iterator[Document]:
        content = kind == "content"
        if self._open is None or self._open["type"] != ("message" if content else "reasoning"):
            yield from self.close()
            if content:
                yield from self._begin("message", "msg", role="assistant", content=[])
            else:
                yield from self._begin("reasoning", "rs", summary=[], content=[])
        item = self._open
        assert item is not None
        if not item["content"]:
            item["content"].append(empty_text() if content else {"type": "reasoning_text", "text": ""})
            if content:
                added = {"type": "response.content_part.added", **self._place(), "content_index": 0}
                yield added | {"part": empty_text()}
        own = item["content"][0]
        own["text"] += text
        name = "output_text" if content else "reasoning_text"
        delta = {"type": f"response.{name}.delta", **self._place(), "content_index": 0, "delta": text}
        if content:
            own["logprobs"] += logprobs
            delta["logprobs"] = logprobs
        yield delta

    def close(self, status: str = "completed") -> Iterator[Document]:
        """Ends the item that is open."""
        item = self._open
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            done = {"type": "response.function_call_arguments.done", **self._place()}
            yield done | {"name": item["name"], "arguments": item["arguments"]}
        else:
            content, at = item["content"][0], {**self._place(), "content_index": 0}
            if item["type"] == "message":
                done = {"type": "response.output_text.done", **at, "text": content["text"]}
                yield done | {"logprobs": content["logprobs"]}
                yield {"type": "response.content_part.done", **at, "part": content}
            else:
                yield {"type": "response.reasoning_text.done", **at, "text": content["text"]}
        yield {"type": "response.output_item.done", "output_index": len(self.output) - 1, "item": dict(item)}
        self._open = None

    def _begin(self, kind: str, prefix: str, **fields: Any) -> Iterator[Document]:
        item: Document = {
            "id": f"{prefix}_{uuid.uuid4().hex}",
            "type": kind,
            "status": "in_progress",
            **fields,
        }
        self.output.append(item)
        self._open = item
        shown = {**item, "content": []} if "content" in item else dict(item)
        yield {"type": "response.output_item.added", "output_index": len(self.output) - 1, "item": shown}

    def _place(self) -> Document:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.output) - 1}


def empty_text() -> Document:
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


async def documents(reply: Reply, asked: ResponsesRequest, chat: ChatRequest) -> AsyncIterator[Document]:
    """All that a stream says; the last one holds the whole response. Raises the engine's error."""
    items, ended = ResponseItems(), None
    begun = False
    async for delta, turn, events in turns(reply, chat):
        if not begun:
            begun = True
            for name in ("created", "in_progress"):
                yield {"type": f"response.{name}", "response": body(reply, asked, items, None)}
        logprobs = logprobs_of(reply.served, delta) if chat.logprobs else []
        for each in events:
            for document in items.take(each, logprobs):
                yield document
            logprobs = []
        if delta.finish_reason is not None:
            ended = turn
    assert ended is not None
    status = "incomplete" if ended.reason in INCOMPLETE else "completed"
    for document in items.close(status):
        yield document
    yield {"type": f"response.{status}", "response": body(reply, asked, items, ended)}


async def respond(reply: Reply, asked: ResponsesRequest, chat: ChatRequest) -> Document:
    """The whole response. Raises the engine's error."""
    last: Document = {}
    async for document in documents(reply, asked, chat):
        last = document
    response: Document = last["response"]
    return response


async def stream(reply: Reply, asked: ResponsesRequest, chat: ChatRequest) -> AsyncIterator[bytes]:
    """The frames of a stream; an error in the midst of it is its last event."""
    number = 0
    try:
        async for document in documents(reply, asked, chat):
            yield event({**document, "sequence_number": number}, name=document["type"])
            number += 1
    except NibbleError as error:
        if not number:
            raise
        answer = inference_answer(error).body["error"]
        failure = {
            "type": "error",
            "code": answer["code"],
            "message": answer["message"],
            "param": answer["param"],
        }
        yield event({**failure, "sequence_number": number}, name="error")


def body(reply: Reply, asked: ResponsesRequest, items: ResponseItems, ended: Turn | None) -> Document:
    """The response as far as it has come; whole if `ended` is given."""
    reason = INCOMPLETE.get(ended.reason or "") if ended else None
    status = "in_progress" if ended is None else "incomplete" if reason else "completed"
    described = asked.text.format if asked.text and asked.text.format else None
    return {
        "id": f"resp_{reply.number}",
        "object": "response",
        "created_at": reply.created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": reason} if reason else None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "model": reply.served.name,
        "output": list(items.output) if ended else [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": asked.reasoning.model_dump() if asked.reasoning else {"effort": None, "summary": None},
        "store": False,
        "temperature": asked.temperature,
        "text": {"format": described.model_dump(by_alias=True) if described else {"type": "text"}},
        "tool_choice": asked.tool_choice or "auto",
        "tools": asked.tools or [],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": asked.top_p,
        "truncation": "disabled",
        "usage": usage(reply, ended) if ended else None,
        "user": asked.user,
    }


def usage(reply: Reply, ended: Turn) -> Document:
    counts = reply.usage()
    reasoning = reply.served.tokenization.encode(ended.reasoning, special_tokens=False)
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": min(len(reasoning), counts["completion_tokens"])},
        "total_tokens": counts["total_tokens"],
    }
