"""Caches the answers that dashboards poll, as long as nothing has changed.

`@polled` names the stamps on which a route's answer depends. Before a cached answer is sent, the stamps and
the caller's records are read from Redis, in one round trip shared by concurrent requests. So a request sees
every earlier write, a revoked key is refused at once, and an unchanged poll takes well below a millisecond.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from redis.exceptions import RedisError
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.callers import Callers
from app.api.least_recent import LeastRecent
from app.api.preconditions import matches_tag
from app.core.access.api_keys import Scope as KeyScope
from app.core.changes.stamps import Values
from app.core.errors import NibbleError

MAX_BYTES = 16 * 1024**2
MAX_ANSWERS = 4096
SENT_UNCHANGED = (b"etag", b"cache-control", b"retry-after")

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
Run = Callable[[Send], Awaitable[None]]  # the application, for one request
Key = tuple[str, frozenset[KeyScope], str, bytes]  # tenant, scopes, path, query


class Polled(NamedTuple):
    """The stamps that an answer depends on, and the longest time that it is cached."""

    lasts_s: float
    stamps: Callable[..., tuple[str, ...]]  # from the tenant and the parameters in the path


def polled(lasts_s: float, stamps: Callable[..., tuple[str, ...]]) -> Callable[[Endpoint], Endpoint]:
    """Cache the answers of a reading route; they may depend only on tenant, scopes, path and query.

    `lasts_s` is short for records that expire without a new stamp: those of dead workers and replicas.
    """

    def mark(endpoint: Endpoint) -> Endpoint:
        vars(endpoint)["polled"] = Polled(lasts_s, stamps)
        return endpoint

    return mark


class KeptAnswer(NamedTuple):
    stamps: Values
    good_until: float  # by time.monotonic()
    headers: list[tuple[bytes, bytes]]
    etag: str
    body: bytes

    def messages(self, if_none_match: str | None) -> Sequence[Message]:
        """Send the answer; 304 to a caller who already has it."""
        status, headers, body = 200, self.headers, self.body
        if self.etag and matches_tag(if_none_match, self.etag):
            status, body = 304, b""
            headers = [header for header in headers if header[0] in SENT_UNCHANGED]
        start = {"type": "http.response.start", "status": status, "headers": list(headers)}
        return start, {"type": "http.response.body", "body": body}


class Flight(NamedTuple):
    """An answer that is being computed."""

    stamps: Values
    landed: asyncio.Event


class PolledAnswers:
    """Answers polled routes from the cache, and passes other requests on."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._routes = [
            route for route in routes if isinstance(route, Route) and hasattr(route.endpoint, "polled")
        ]
        self._kept: LeastRecent[Key, KeptAnswer] = LeastRecent(
            MAX_ANSWERS, most_bytes=MAX_BYTES, bytes_of=lambda answer: len(answer.body)
        )
        self._flights: dict[Key, Flight] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        matched = self._matched(scope)
        if matched is None:
            await self._app(scope, receive, send)
            return
        route, parameters = matched
        rule: Polled = vars(route.endpoint)["polled"]
        callers: Callers = scope["app"].state.services.callers
        try:
            principal, stamps = await callers.with_stamps(scope, partial(rule.stamps, **parameters))
        except (RedisError, NibbleError):  # the route reports the error
            await self._app(scope, receive, send)
            return
        scope["route"] = route  # for the metrics
        key = (principal.tenant, principal.scopes, scope["path"], scope["query_string"])
        answer = await self._answer(key, stamps, rule.lasts_s, partial(self._whole, scope, receive))
        if_none_match = header(scope, b"if-none-match")
        for message in answer.messages(if_none_match) if isinstance(answer, KeptAnswer) else answer:
            await send(message)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The answer without If-None-Match: it also serves callers with another version."""
        headers = [pair for pair in scope["headers"] if pair[0] != b"if-none-match"]
        await self._app({**scope, "headers": headers}, receive, send)

    def _matched(self, scope: Scope) -> tuple[Route, dict[str, str]] | None:
        """The polled route of a request, with its path parameters."""
        if scope["type"] != "http" or scope["method"] != "GET":
            return None
        for route in self._routes:
            match = route.path_regex.match(scope["path"])
            if match is not None:
                return (route, match.groupdict()) if header(scope, b"prefer") is None else None
        return None

    async def _answer(self, key: Key, stamps: Values, lasts_s: float, run: Run) -> KeptAnswer | list[Message]:
        """The cached answer if it is current, waiting for one in progress; else the answer of `run`."""
        flight = self._flights.get(key)
        if flight is not None and flight.stamps == stamps:
            await flight.landed.wait()
        cached = self._kept.get(key)
        if cached is not None and cached.stamps == stamps and time.monotonic() < cached.good_until:
            return cached
        flight = self._flights[key] = Flight(stamps, asyncio.Event())
        try:
            answer = await computed(stamps, lasts_s, run)
            if isinstance(answer, KeptAnswer):
                self._kept.put(key, answer)
        finally:
            flight.landed.set()
            if self._flights.get(key) is flight:
                del self._flights[key]
        return answer


async def computed(stamps: Values, lasts_s: float, run: Run) -> KeptAnswer | list[Message]:
    """Run the application; an answer to cache, or the messages of any other answer."""
    good_until = time.monotonic() + lasts_s
    messages: list[Message] = []

    async def collect(message: Message) -> None:
        messages.append(dict(message))

    await run(collect)
    if len(messages) != 2 or messages[0]["status"] != 200:
        return messages
    headers: list[tuple[bytes, bytes]] = messages[0]["headers"]
    etag = next((value for name, value in headers if name == b"etag"), b"").decode()
    return KeptAnswer(stamps, good_until, headers, etag, messages[1].get("body", b""))


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of that name."""
    return next((value.decode("latin-1") for each, value in scope["headers"] if each == name), None)
