"""One authenticator: every way to lose a credential is noticed at once, wherever the caller asks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from redis import Redis
from redis.exceptions import RedisError

from app.api import callers
from app.api.callers import Callers, no_stamps
from app.core.access.api_keys import KeyStore, Principal, Scope, key_id, new_key
from app.core.access.authentication import Authenticator
from app.core.access.limits import REREAD_S, Limits, TenantLimits
from app.core.changes.redis_keys import jobs_stamp
from app.core.changes.stamps import StampReader
from app.core.errors import Forbidden, Unauthenticated
from app.core.redis.redis_server import connect
from app.core.settings import Settings
from tests.integration.api_service import Service
from tests.integration.test_redis_outage import DurableValkey

# A route whose answers are kept, one that asks for a scope, one that asks for none, and inference.
SURFACES = {
    "kept": ("GET", "/v1/jobs"),
    "scope": ("GET", "/v1/artifacts"),
    "none": ("POST", "/v1/login-links"),
    "inference": ("GET", "/v1/models"),
}
SCOPES = (Scope.JOBS_READ, Scope.ARTIFACTS_READ, Scope.INFERENCE)


class Visitor:
    """A caller of the service, by key or by a session of that key."""

    def __init__(self, service: Service, *, by_session: bool, tenant: str = "default") -> None:
        self.service = service
        self.tenant = tenant
        self.key = service.key(*SCOPES, tenant=tenant)
        self.client = service.client_with(None if by_session else self.key)
        if by_session:
            with service.client_with(self.key) as client:
                self.client.get(client.post("/v1/login-links").json()["path"])
            self.client.headers["Origin"] = service.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def ask(self, surface: str) -> httpx.Response:
        method, path = SURFACES[surface]
        return self.client.request(method, path)

    def revoke(self) -> None:
        self.service.client.delete(f"/v1/keys/{key_id(self.key)}").raise_for_status()

    def close_session(self) -> None:
        session = dict(self.client.cookies)
        self.client.post("/v1/logout").raise_for_status()
        self.client.cookies.update(session)

    def change(self, **fields: Any) -> None:
        """Change the key's record as another process does."""
        keys = KeyStore(self.service.redis)
        (record,) = [each for each in keys.list(None) if each.id == key_id(self.key)]
        keys.keep(record.model_copy(update=fields))

    def expire(self) -> None:
        self.change(expires_at=datetime.now(UTC) - timedelta(seconds=1))

    def lose_scopes(self) -> None:
        self.change(scopes=frozenset({Scope.DEPLOYMENTS_READ}))


LOSSES: dict[str, tuple[Callable[[Visitor], None], int, str]] = {
    "revoked": (Visitor.revoke, 401, "api_key_unknown"),
    "expired": (Visitor.expire, 401, "api_key_expired"),
    "closed": (Visitor.close_session, 401, "session_unknown"),
    "narrowed": (Visitor.lose_scopes, 403, "scope_missing"),
}


# A key has no session to close.
@pytest.mark.parametrize(
    ("loss", "by_session"),
    [(loss, how) for loss in LOSSES for how in (False, True) if how or loss != "closed"],
)
def test_a_lost_credential_is_refused_at_once(service: Service, loss: str, by_session: bool) -> None:
    lose, status, code = LOSSES[loss]
    for surface in SURFACES:
        if (surface, loss) == ("none", "narrowed"):
            continue  # it asks for no scope
        with Visitor(service, by_session=by_session) as visitor:
            assert {visitor.ask(surface).status_code for _ in range(4)} <= {200, 201}
            lose(visitor)
            answers = [visitor.ask(surface) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [status] * 3, surface
        documents = [answer.json() for answer in answers]
        assert [document.get("error", document)["code"] for document in documents] == [code] * 3, surface


@pytest.mark.parametrize("by_session", [False, True])
def test_each_request_counts_once(service: Service, by_session: bool) -> None:
    for tenant, surface in enumerate(SURFACES):
        with Visitor(service, by_session=by_session, tenant=f"t{tenant}") as visitor:
            visitor.ask(surface)
            # 30 a minute: five may come at once, and the next one two seconds later.
            TenantLimits(service.redis, service.settings).set(visitor.tenant, Limits(requests_per_minute=30))
            time.sleep(REREAD_S + 0.1)
            statuses = [visitor.ask(surface).status_code for _ in range(12)]
        assert set(statuses[:5]) <= {200, 201}, surface
        assert 429 in statuses[5:], surface


class Callee:
    """Callers over a Redis, as one API process has them."""

    def __init__(self, url: str, state_dir: Path) -> None:
        self.redis: Redis = connect(url)
        self.keys = KeyStore(self.redis)
        limits = TenantLimits(self.redis, Settings(state_dir=state_dir))
        self.stamps = StampReader(url)
        self.is_offline = False
        authenticator = Authenticator(self.redis, self.keys, limits)
        self.callers = Callers(authenticator, limits, self.stamps, lambda: self.is_offline)

    def new_key(self, **fields: Any) -> str:
        key = new_key()
        self.keys.register(key, tenant="t", scopes=frozenset({Scope.INFERENCE}), **fields)
        return key

    async def ask(self, key: str, *, outlasts_redis: bool = False) -> Principal:
        return await self.callers.of(scope_with(authorization=f"Bearer {key}"), outlasts_redis=outlasts_redis)


def scope_with(method: str = "GET", **headers: str) -> dict[str, Any]:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": method, "headers": pairs, "state": {}}


def run(url: str, state_dir: Path, steps: Callable[[Callee], Awaitable[None]]) -> None:
    async def whole() -> None:
        callee = Callee(url, state_dir)
        try:
            await steps(callee)
        finally:
            await callee.stamps.close()
            callee.redis.close()

    asyncio.run(whole())


def test_remembered_callers_of_inference_outlast_redis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    valkey = DurableValkey(tmp_path)

    async def steps(callee: Callee) -> None:
        key, stranger = callee.new_key(), callee.new_key()
        soon = callee.new_key(expires_at=datetime.now(UTC) + timedelta(seconds=1))
        revoked = callee.new_key()
        for each in (key, soon, revoked):
            await callee.ask(each)
        callee.keys.revoke(key_id(revoked), tenant=None)
        with pytest.raises(Unauthenticated):
            await callee.ask(revoked, outlasts_redis=True)
        valkey.kill()
        await asyncio.sleep(1)
        for is_noticed in (False, True):
            callee.is_offline = is_noticed
            assert (await callee.ask(key, outlasts_redis=True)).tenant == "t"
            for other in (stranger, soon, revoked):
                with pytest.raises(RedisError):
                    await callee.ask(other, outlasts_redis=True)
            with pytest.raises(RedisError):
                await callee.ask(key)
        monkeypatch.setattr(callers, "OFFLINE_S", 0.0)
        with pytest.raises(RedisError):
            await callee.ask(key, outlasts_redis=True)

    try:
        run(valkey.url, tmp_path, steps)
    finally:
        valkey.kill()


def test_stamps_come_with_the_caller_and_are_read_after_the_request(
    redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    async def steps(callee: Callee) -> None:
        header = f"Bearer {callee.new_key()}"
        for value in (b"1", b"2", b"3"):
            redis.set(jobs_stamp("t"), value)
            _, values = await callee.callers.with_stamps(
                scope_with(authorization=header), lambda tenant: (jobs_stamp(tenant),)
            )
            assert values == (value,)

    run(redis_url, tmp_path, steps)


def test_the_header_goes_before_the_cookie_and_a_change_by_cookie_names_its_origin(
    redis_url: str, tmp_path: Path
) -> None:
    async def steps(callee: Callee) -> None:
        key = callee.new_key()
        cookie = "nibble_session=unknown"
        both = scope_with(authorization=f"bearer  {key} ", cookie=cookie)
        assert (await callee.callers.of(both)).key_id == key_id(key)
        refused: list[tuple[dict[str, Any], type[Exception], str]] = [
            (scope_with(), Unauthenticated, "api_key_missing"),
            (scope_with(authorization="Bearer "), Unauthenticated, "api_key_missing"),
            (scope_with(authorization=f"Basic {key}"), Unauthenticated, "api_key_missing"),
            (scope_with(authorization=f"Basic {key}", cookie=cookie), Unauthenticated, "session_unknown"),
            (scope_with(cookie=cookie), Unauthenticated, "session_unknown"),
            (scope_with("POST", cookie=cookie), Forbidden, "origin_missing"),
            (scope_with("POST", cookie=cookie, origin="http://a"), Unauthenticated, "session_unknown"),
        ]
        for scope, kind, code in refused:
            with pytest.raises(kind) as refusal:
                await callee.callers.with_stamps(scope, no_stamps)
            assert refusal.value.code == code  # type: ignore[attr-defined]  # of NibbleError

    run(redis_url, tmp_path, steps)
