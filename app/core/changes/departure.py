"""Stops work when its caller disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]  # ASGI's


class CallerGone(Exception):
    """The caller has disconnected."""


async def disconnected(receive: Receive) -> None:
    """Return when the caller has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(gone: asyncio.Task[None], work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if `gone` ends before it. Raises CallerGone then."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
    finally:
        task.cancel()
    await asyncio.wait({task})
    raise CallerGone
