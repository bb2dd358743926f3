"""Answers that many dashboards ask for again and again, kept while nothing has changed.

Before an answer is given again, the stamps of what it shows, the caller's key and its session are read from
Redis, after the request came and in one round trip for all requests of the moment. So a request always sees
what was written before it, a revoked key is refused at once, and a poll without news costs a fraction of a
millisecond. Everything else passes to the routes, which know nothing of this.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections import OrderedDict
from typing import Any, Literal, NamedTuple

from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.dependencies import SESSION_COOKIE, Services
from app.api.preconditions import matches_tag
from app.core.access.api_keys import USE_STEP_S, ApiKey, key_id, recognised, record_key
from app.core.access.api_keys import Scope as KeyScope
from app.core.changes.redis_keys import (
    DEPLOYMENTS_STAMP,
    WORKERS_STAMP,
    job_key,
    jobs_stamp,
    limits_key,
    session_key,
)
from app.core.changes.stamps import Values
from app.core.errors import Unauthenticated
from app.core.records.ids import is_id

MAX_BYTES = 16 * 1024**2
MAX_CALLERS = 8192
MAX_KEPT = 4096
PREFIX = "/v1/"
IDS: dict[str, Literal["job", "dep"]] = {"jobs": "job", "deployments": "dep"}
# How long an answer may be given again at most. Short where something may vanish without a word: the records
# of workers and replicas that died expire.
KEPT_S = {"jobs": 30.0, "workers": 2.0, "deployments": 1.0}
SENT_UNCHANGED = (b"etag", b"cache-control", b"retry-after")

Headers = list[tuple[bytes, bytes]]


class Credential(NamedTuple):
    digest: bytes
    name: str  # of the value in Redis that it leads to
    key: str | None  # an API key; None for a session


class Question(NamedTuple):
    """A request that may be answered from here."""

    kind: str
    resource: str | None  # an id
    path: str
    query: bytes
    if_none_match: str | None

    def stamps(self, tenant: str) -> tuple[str, ...]:
        if self.kind == "workers":
            return (WORKERS_STAMP,)
        if self.kind == "deployments":
            return (DEPLOYMENTS_STAMP, WORKERS_STAMP)
        return (job_key(self.resource),) if self.resource is not None else (jobs_stamp(tenant),)


class Caller(NamedTuple):
    """Who called with a credential, and what was read of it before that."""

    key_id: str
    tenant: str
    scopes: frozenset[KeyScope]
    values: Values
    is_limited: bool  # its requests are counted, which is left to the routes
    good_until: float  # by time.time()


class Kept(NamedTuple):
    stamps: Values
    good_until: float  # by time.monotonic()
    headers: Headers
    etag: str
    body: bytes
    route: Any  # for the metrics


class Flight(NamedTuple):
    """An answer that is being computed."""

    stamps: Values
    landed: asyncio.Event


Key = tuple[str, frozenset[KeyScope], str, bytes]
Asgi = tuple[Scope, Receive, Send]


class PolledAnswers:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._callers: OrderedDict[bytes, Caller] = OrderedDict()
        self._kept: OrderedDict[Key, Kept] = OrderedDict()
        self._bytes = 0
        self._flights: dict[Key, Flight] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = asked_of(scope)
        if asked is None:
            await self._app(scope, receive, send)
            return
        question, credential = asked
        services: Services = scope["app"].state.services
        try:
            found = await self._caller(services, credential, question)
        except (RedisError, Unauthenticated):  # the route says what that means
            found = None
        if found is None:
            await self._app(scope, receive, send)
            return
        caller, stamps = found
        key = (caller.tenant, caller.scopes, question.path, question.query)
        await self._answer(key, question, stamps, (scope, receive, send))

    async def _caller(
        self, services: Services, credential: Credential, question: Question
    ) -> tuple[Caller, Values] | None:
        """Who calls, and the stamps of what is asked for; None for callers whose requests are counted."""
        for _ in range(2):  # the second time for one who was not known, or has changed
            caller = self._callers.get(credential.digest)
            if caller is not None and time.time() < caller.good_until:
                names = (credential.name, record_key(caller.key_id), limits_key(caller.tenant))
                values = await services.stamps.read((*names, *question.stamps(caller.tenant)))
                if values[: len(names)] == caller.values:
                    return (caller, values[len(names) :]) if not caller.is_limited else None
            self._callers.pop(credential.digest, None)
            await self._meet(services, credential)
        return None

    async def _meet(self, services: Services, credential: Credential) -> None:
        """Remember who holds the credential. Raises Unauthenticated if nobody does."""
        first = kept = (await services.stamps.read((credential.name,)))[0]
        if credential.key is not None:
            record = recognised(credential.key, kept)
        else:
            if first is None:
                return
            (kept,) = await services.stamps.read((record_key(first.decode()),))
            if kept is None:
                return
            record = ApiKey.model_validate_json(kept)
        (limits,) = await services.stamps.read((limits_key(record.tenant),))
        await run_in_threadpool(services.keys.note_use, record.id)
        # Later its use is noted again.
        expires = record.expires_at.timestamp() if record.expires_at is not None else math.inf
        self._callers[credential.digest] = Caller(
            key_id=record.id,
            tenant=record.tenant,
            scopes=record.scopes,
            values=(first, kept, limits),
            is_limited=services.limits.parsed(limits).requests_per_minute > 0,
            good_until=min(expires, time.time() + USE_STEP_S),
        )
        if len(self._callers) > MAX_CALLERS:
            self._callers.popitem(last=False)

    async def _answer(self, key: Key, question: Question, stamps: Values, asgi: Asgi) -> None:
        """Give what is kept, if it is still true, also what another request is computing; else compute it."""
        scope, _, send = asgi
        flight = self._flights.get(key)
        if flight is not None and flight.stamps == stamps:
            await flight.landed.wait()
        kept = self._kept.get(key)
        if kept is not None and kept.stamps == stamps and time.monotonic() < kept.good_until:
            self._kept.move_to_end(key)
            scope["route"] = kept.route
            await give(kept, question, send)
            return
        flight = self._flights[key] = Flight(stamps, asyncio.Event())
        try:
            await self._compute(key, question, stamps, asgi)
        finally:
            flight.landed.set()
            if self._flights.get(key) is flight:
                del self._flights[key]

    async def _compute(self, key: Key, question: Question, stamps: Values, asgi: Asgi) -> None:
        scope, receive, send = asgi
        good_until = time.monotonic() + KEPT_S[question.kind]
        messages: list[Message] = []

        async def collect(message: Message) -> None:
            messages.append(dict(message))

        # Without the condition: others will ask who have another version, or none.
        whole = {**scope, "headers": [each for each in scope["headers"] if each[0] != b"if-none-match"]}
        await self._app(whole, receive, collect)
        scope["route"] = whole.get("route")
        if len(messages) == 2 and messages[0]["status"] == 200:
            headers: Headers = messages[0]["headers"]
            etag = next((value for name, value in headers if name == b"etag"), b"").decode()
            kept = Kept(stamps, good_until, headers, etag, messages[1].get("body", b""), scope["route"])
            self._keep(key, kept)
            await give(kept, question, send)
            return
        for message in messages:
            await send(message)

    def _keep(self, key: Key, kept: Kept) -> None:
        before = self._kept.pop(key, None)
        self._bytes -= len(before.body) if before is not None else 0
        self._kept[key] = kept
        self._bytes += len(kept.body)
        while self._bytes > MAX_BYTES or len(self._kept) > MAX_KEPT:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= len(oldest.body)


def asked_of(scope: Scope) -> tuple[Question, Credential] | None:
    """What is asked for and with which credential, if it may be answered from here."""
    if scope["type"] != "http" or scope["method"] != "GET":
        return None
    path = scope["path"]
    if not path.startswith(PREFIX):
        return None
    kind, _, resource = path[len(PREFIX) :].partition("/")
    if kind not in KEPT_S or (resource and not (kind in IDS and is_id(IDS[kind], resource))):
        return None
    given = dict(reversed(scope["headers"]))  # of a repeated one the first counts, as for the routes
    credential = credential_of(given)
    if credential is None or b"prefer" in given:
        return None
    tag = given.get(b"if-none-match")
    known = tag.decode("latin-1") if tag is not None else None
    return Question(kind, resource or None, path, scope["query_string"], known), credential


def credential_of(given: dict[bytes, bytes]) -> Credential | None:
    """The API key, else a session's cookie, as the routes read them; None for what only they can judge."""
    bearer = given.get(b"authorization")
    if bearer is not None:
        scheme, _, key = bearer.decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or not key:
            return None
        return Credential(hashlib.sha256(bearer).digest(), record_key(key_id(key)), key)
    cookie = given.get(b"cookie", b"").decode("latin-1")
    session = cookie_parser(cookie).get(SESSION_COOKIE) if SESSION_COOKIE in cookie else None
    if not session:
        return None
    return Credential(hashlib.sha256(b"session " + session.encode()).digest(), session_key(session), None)


async def give(kept: Kept, question: Question, send: Send) -> None:
    if kept.etag and matches_tag(question.if_none_match, kept.etag):
        headers = [each for each in kept.headers if each[0] in SENT_UNCHANGED]
        await send({"type": "http.response.start", "status": 304, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
        return
    await send({"type": "http.response.start", "status": 200, "headers": list(kept.headers)})
    await send({"type": "http.response.body", "body": kept.body})
