"""Authenticates the caller of every route, cached answer and inference request.

A caller is cached while the records of its key, session and limits are unchanged. Each request checks their
stamps, in one round trip shared by concurrent requests, so a revoked key is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool
from starlette.requests import cookie_parser
from starlette.types import Scope

from app.api.least_recent import LeastRecent
from app.core.access.api_keys import USE_STEP_S, Principal
from app.core.access.authentication import Authenticator, Credential, Holder
from app.core.access.limits import TenantLimits
from app.core.changes.stamps import StampReader, Values
from app.core.errors import Forbidden, Unauthenticated

OFFLINE_S = 300.0  # how long cached callers may use inference while Redis does not answer
MAX_CALLERS = 8192
SESSION_COOKIE = "nibble_session"
KEY_HEADERS = (b"x-api-key", b"api-key")
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

StampsOf = Callable[[str], tuple[str, ...]]  # the names of stamps, from the caller's tenant


def no_stamps(tenant: str) -> tuple[str, ...]:
    return ()


class Callers:
    """Caches callers by credential. `is_offline` returns True after Redis failed to answer."""

    def __init__(
        self,
        authenticator: Authenticator,
        limits: TenantLimits,
        stamps: StampReader,
        is_offline: Callable[[], bool],
    ) -> None:
        self._authenticator = authenticator
        self._limits = limits
        self._stamps = stamps
        self._is_offline = is_offline
        self._holders: LeastRecent[bytes, Holder] = LeastRecent(MAX_CALLERS)

    async def of(self, scope: Scope, *, outlasts_redis: bool = False) -> Principal:
        """Return the caller of a request, and count the request once against the tenant's rate.

        With `outlasts_redis`, cached callers are accepted, uncounted, while Redis does not answer. Raises
        Unauthenticated, Forbidden for a session's change without an origin, RateLimited, RedisError.
        """
        principal = cast("Principal | None", scope["state"].get("principal"))
        if principal is None:
            principal, _ = await self.with_stamps(scope, no_stamps, outlasts_redis=outlasts_redis)
        return principal

    async def with_stamps(
        self, scope: Scope, stamps_of: StampsOf, *, outlasts_redis: bool = False
    ) -> tuple[Principal, Values]:
        """As `of`, with the current values of the stamps."""
        holder, values = await self._current(credential_of(scope), stamps_of, outlasts_redis=outlasts_redis)
        if holder.is_limited and values is not None:
            await run_in_threadpool(self._limits.count_request, holder.principal.tenant)
        scope["state"]["principal"] = holder.principal  # for the audit log and later calls
        return holder.principal, values or ()

    async def _current(
        self, credential: Credential, stamps_of: StampsOf, *, outlasts_redis: bool
    ) -> tuple[Holder, Values | None]:
        """The credential's holder and the stamps, or None for the stamps if Redis did not answer."""
        holder = self._holders.get(credential.digest)
        may_last = outlasts_redis and holder is not None and holder.is_good_for(OFFLINE_S)
        if holder is not None and may_last and self._is_offline():
            return holder, None
        try:
            return await self._checked(credential, holder, stamps_of, is_patient=not may_last)
        except RedisError:
            holder = self._holders.get(credential.digest)  # None if its records have changed
            if holder is None or not may_last:
                raise
            return holder, None

    async def _checked(
        self, credential: Credential, holder: Holder | None, stamps_of: StampsOf, *, is_patient: bool
    ) -> tuple[Holder, Values]:
        """The cached holder if its records are unchanged, else the one read from Redis. Raises RedisError."""
        if holder is not None:
            try:
                values = await self._stamps.read((*holder.names, *stamps_of(holder.principal.tenant)))
            except RedisError:
                if not is_patient:
                    raise
            else:
                count = len(holder.names)
                is_same = values[:count] == holder.values
                if is_same and holder.is_good_for(USE_STEP_S):
                    return holder, values[count:]
                if not is_same:
                    self._holders.drop(credential.digest)
        # Read once a minute even if unchanged, to record the key's use.
        holder = await run_in_threadpool(self._authenticator.holder, credential)
        self._holders.put(credential.digest, holder)
        stamps = stamps_of(holder.principal.tenant)
        return holder, await self._stamps.read(stamps) if stamps else ()


def key_of(scope: Scope) -> str | None:
    """The API key in the headers: a bearer's, else that of Anthropic's clients, else that of Azure's."""
    headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))  # the first of repeated headers counts
    scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    for name in KEY_HEADERS:
        if key := headers.get(name, b"").decode("latin-1").strip():
            return key
    return None


def credential_of(scope: Scope) -> Credential:
    """The API key in the headers, else the cookie of a browser's session."""
    key = key_of(scope)
    if key is not None:
        return Credential.of_key(key)
    session = session_of(scope)
    if session is None:
        raise Unauthenticated(
            "the request carries no API key",
            code="api_key_missing",
            remedy="send `Authorization: Bearer <key>` or `x-api-key: <key>`",
        )
    # A browser sends the cookie on its own, and the Origin with every change.
    if scope["method"] not in SAFE_METHODS and all(name != b"origin" for name, _ in scope["headers"]):
        raise Forbidden(
            "a change with a session's cookie must name its origin",
            code="origin_missing",
            remedy="send the header Origin, or use an API key",
        )
    return Credential.of_session(session)


def session_of(scope: Scope) -> str | None:
    """The session in the request's cookies; the last one counts."""
    cookies: dict[str, str] = {}
    for name, value in scope["headers"]:
        if name == b"cookie":
            cookies |= cookie_parser(value.decode("latin-1"))
    return cookies.get(SESSION_COOKIE)
