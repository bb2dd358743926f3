from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx

from app.api.relay import MAX_PARTIAL_EVENT, Upstream


def relayed(*pieces: bytes) -> list[bytes]:
    """What a caller gets when a server's bytes come in these pieces."""

    async def rest() -> AsyncIterator[bytes]:
        for piece in pieces[1:]:
            yield piece

    async def collect() -> list[bytes]:
        upstream = Upstream(httpx.Response(200), rest(), pieces[0], is_stream=True, on_close=lambda: None)
        return [events async for events in upstream.events()]

    return asyncio.run(collect())


def test_whole_events_pass_at_once() -> None:
    assert relayed(b"data: 1\n\n", b"data: 2\n\ndata: 3\n\n") == [b"data: 1\n\n", b"data: 2\n\ndata: 3\n\n"]


def test_half_an_event_waits_for_its_other_half() -> None:
    assert relayed(b"data: 1\n\ndata:", b" 2\n", b"\ndata: 3\n\n") == [
        b"data: 1\n\n",
        b"data: 2\n\ndata: 3\n\n",
    ]


def test_nothing_is_lost_at_the_end() -> None:
    assert relayed(b"data: 1\n\n", b"data: 2") == [b"data: 1\n\n", b"data: 2"]
    assert relayed(b"") == []


def test_an_event_without_end_does_not_fill_memory() -> None:
    large = b"x" * (MAX_PARTIAL_EVENT + 1)
    assert relayed(b"a", large) == [b"a" + large]
