"""Relays an inference server's answer to the caller."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import httpx
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.core.errors import Unavailable
from app.core.faults.error_answers import ANTHROPIC, inference_answer

EVENT_END = b"\n\n"
MAX_PARTIAL_EVENT = 1024 * 1024
PASSED_BACK = ("content-type", "retry-after")
LOST = Unavailable(
    "the inference server ended before the answer was complete; it is being started again",
    code="replica_lost",
)


def lost_events(path: str) -> bytes:
    """The last events of a stream whose server ended, in the words of the path's contract."""
    content = json.dumps(inference_answer(LOST, path=path).body)
    if path.startswith(ANTHROPIC):
        return f"event: error\ndata: {content}\n\n".encode()
    return f"data: {content}\n\ndata: [DONE]\n\n".encode()


class Upstream:
    """A server's answer whose first bytes have arrived."""

    def __init__(
        self,
        response: httpx.Response,
        chunks: AsyncIterator[bytes],
        first: bytes,
        *,
        is_stream: bool,
        on_close: Callable[[], None],
    ) -> None:
        self.response = response
        self.first = first
        self.is_stream = is_stream
        self._chunks = chunks
        self._on_close: Callable[[], None] | None = on_close

    def passed_headers(self) -> dict[str, str]:
        headers = {name: self.response.headers[name] for name in PASSED_BACK if name in self.response.headers}
        if self.response.status_code in (429, 503):
            headers.setdefault("retry-after", "1")
        return headers

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the bytes as they arrive, in whole events, so that an error event can follow any chunk."""
        partial = b""
        pending = self.first
        while pending:
            pending = partial + pending
            end = pending.rfind(EVENT_END) + len(EVENT_END)
            if end < len(EVENT_END):
                end = len(pending) if len(pending) > MAX_PARTIAL_EVENT else 0
            if end:
                yield pending[:end]
            partial = pending[end:]
            pending = await anext(self._chunks, b"")
        if partial:
            yield partial

    async def close(self) -> None:
        if self._on_close is not None:
            self._on_close()
            self._on_close = None
        await self.response.aclose()


class RelayedEvents(Response):
    """Relays a stream until the server ends it; closes the server's stream when the caller disconnects."""

    def __init__(
        self, upstream: Upstream, gone: asyncio.Task[None], on_end: Callable[[int], None], lost: bytes
    ) -> None:
        self._upstream = upstream
        self._lost = lost
        self._gone = gone
        self._on_end = on_end
        headers = {**upstream.passed_headers(), "cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(status_code=upstream.response.status_code, headers=headers)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.create_task(self._pump(send))
        status = 499
        try:
            await asyncio.wait({pump, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                status = pump.result()
        finally:
            for task in (pump, self._gone):
                task.cancel()
            await asyncio.wait({pump})
            await self._upstream.close()
            self._on_end(status)

    async def _pump(self, send: Send) -> int:
        """Send the whole stream; returns the status to record for it."""
        status = self._upstream.response.status_code
        await send({"type": "http.response.start", "status": status, "headers": self.raw_headers})
        try:
            async for events in self._upstream.events():
                await send({"type": "http.response.body", "body": events, "more_body": True})
        except httpx.HTTPError:
            await send({"type": "http.response.body", "body": self._lost, "more_body": True})
            status = 502
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return status
