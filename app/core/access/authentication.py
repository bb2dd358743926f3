"""Authentication by API key, or by a browser's session that stands for one. All callers pass here."""

from __future__ import annotations

import hashlib
import time
from typing import Any, NamedTuple, Self

from redis import Redis

from app.core.access.api_keys import KeyStore, Principal, key_id, parsed_record, recognised, record_key
from app.core.access.limits import TenantLimits
from app.core.access.login import session_holder
from app.core.changes.redis_keys import limits_key, session_key


class Credential(NamedTuple):
    """The API key or session cookie of a request."""

    digest: bytes
    name: str  # in Redis: of the key's record, or of the session
    key: str | None  # None for a session

    @classmethod
    def of_key(cls, key: str) -> Self:
        return cls(hashlib.sha256(key.encode()).digest(), record_key(key_id(key)), key)

    @classmethod
    def of_session(cls, session: str) -> Self:
        return cls(hashlib.sha256(b"session " + session.encode()).digest(), session_key(session), None)


class Holder(NamedTuple):
    """The holder of a credential, valid while Redis has `values` under `names`."""

    principal: Principal
    names: tuple[str, ...]
    values: tuple[bytes | None, ...]
    is_limited: bool  # the tenant's requests are counted
    read_at: float  # by time.monotonic()
    expires_at: float  # by time.time()

    def is_good_for(self, seconds: float) -> bool:
        """Whether it was read less than `seconds` ago and the key has not expired."""
        return time.monotonic() - self.read_at < seconds and time.time() < self.expires_at


class Authenticator:
    """Authenticates credentials against Redis."""

    def __init__(self, redis: Redis, keys: KeyStore, limits: TenantLimits) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable
        self._keys = keys
        self._limits = limits

    def holder(self, credential: Credential) -> Holder:
        """The credential's holder. Raises Unauthenticated if it is unknown, revoked or expired."""
        read_at = time.monotonic()
        first = stored = self._redis.get(credential.name)
        name = credential.name
        if credential.key is not None:
            record = recognised(credential.key, stored)
        else:
            name = record_key(session_holder(first))
            stored = self._redis.get(name)
            record = parsed_record(stored)
        principal = self._keys.admitted(record)
        limits = self._redis.get(limits_key(record.tenant))
        return Holder(
            principal=principal,
            names=(credential.name, name, limits_key(record.tenant)),
            values=(first, stored, limits),
            is_limited=self._limits.parsed(limits).requests_per_minute > 0,
            read_at=read_at,
            expires_at=record.expires_at_s,
        )
