"""Answers that many dashboards ask for again and again, kept while nothing has changed.

A route says with `@polled` on which stamps its answer depends. Before a kept answer is sent again, they are
read from Redis, together with the records of the caller, after the request came and in one round trip for all
requests of the moment. So a request always sees what was written before it, a revoked key is refused at once,
and a poll without news costs a fraction of a millisecond.
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
    """How long an answer may be sent again at most, and the stamps that it depends on."""

    lasts_s: float
    stamps: Callable[..., tuple[str, ...]]  # from the tenant and the parameters in the path


def polled(lasts_s: float, stamps: Callable[..., tuple[str, ...]]) -> Callable[[Endpoint], Endpoint]:
    """Keep the answers of a route that reads. They differ by tenant, scopes, path and query alone.

    `lasts_s` is short where something may vanish without a change of its stamp: the records of workers and
    replicas that died expire.
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
        """The answer to one request: 304 for a caller who has it."""
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
    """Answers for those of the `routes` that are polled."""

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
        except (RedisError, NibbleError):  # the route says what that means
            await self._app(scope, receive, send)
            return
        scope["route"] = route  # for the metrics
        # Without the condition: others will ask who have another version, or none.
        whole = {**scope, "headers": [each for each in scope["headers"] if each[0] != b"if-none-match"]}
        key = (principal.tenant, principal.scopes, scope["path"], scope["query_string"])
        answer = await self._answer(key, stamps, rule.lasts_s, partial(self._app, whole, receive))
        if_none_match = header(scope, b"if-none-match")
        for message in answer.messages(if_none_match) if isinstance(answer, KeptAnswer) else answer:
            await send(message)

    def _matched(self, scope: Scope) -> tuple[Route, dict[str, str]] | None:
        """The polled route that a request asks for, with the parameters in its path."""
        if scope["type"] != "http" or scope["method"] != "GET":
            return None
        for route in self._routes:
            match = route.path_regex.match(scope["path"])
            if match is not None:
                return (route, match.groupdict()) if header(scope, b"prefer") is None else None
        return None

    async def _answer(self, key: Key, stamps: Values, lasts_s: float, run: Run) -> KeptAnswer | list[Message]:
        """The kept answer if it is still true, be it one that is being computed; else what `run` sends."""
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
    """What the application sends: an answer to keep, or the messages of any other one."""
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
