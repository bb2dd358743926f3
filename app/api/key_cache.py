"""Callers of inference routes by their keys, remembered while the records of key and limits stay the same.

Each request reads both records, in the one round trip that all requests of the moment share, so a revoked key
is refused at once. While Redis does not answer, callers that were known go on.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool

from app.core.access.api_keys import USE_STEP_S, ApiKey, KeyStore, Principal, key_id, record_key
from app.core.access.limits import TenantLimits
from app.core.changes.redis_keys import limits_key
from app.core.changes.stamps import StampReader, Values

OFFLINE_S = 300.0  # while Redis does not answer, known keys stay good for so long
MAX_KEYS = 4096


class Known(NamedTuple):
    principal: Principal
    values: Values  # the records of the key and of its tenant's limits, read before
    is_limited: bool
    checked: float  # by time.monotonic()
    good_until: float  # by time.time()


class KeyCache:
    """Asks the key store for what is new."""

    def __init__(
        self, keys: KeyStore, limits: TenantLimits, stamps: StampReader, is_offline: Callable[[], bool]
    ) -> None:
        self._keys = keys
        self._limits = limits
        self._stamps = stamps
        self._is_offline = is_offline
        self._known: OrderedDict[bytes, Known] = OrderedDict()

    async def authenticate(self, key: str) -> Principal:
        """Whose key this is. Counts the request against the tenant's rate.

        Raises Unauthenticated for an unknown key, RateLimited beyond the rate.
        """
        digest = hashlib.sha256(key.encode()).digest()
        known = self._known.get(digest)
        is_recent = known is not None and time.monotonic() - known.checked < OFFLINE_S
        if known is not None and is_recent and self._is_offline():
            return known.principal
        try:
            known = await self._current(digest, key, known)
            if known.is_limited:
                await run_in_threadpool(self._limits.count_request, known.principal.tenant)
        except RedisError:
            if known is None or not is_recent:
                raise
        return known.principal

    async def _current(self, digest: bytes, key: str, known: Known | None) -> Known:
        """What is known, if it still holds; else what the key store says."""
        limits = (limits_key(known.principal.tenant),) if known is not None else ()
        values = await self._stamps.read((record_key(key_id(key)), *limits))
        if known is not None and values == known.values and time.time() < known.good_until:
            return known
        try:
            principal = await run_in_threadpool(self._keys.authenticate, key)
        except RedisError:
            raise
        except BaseException:
            self._known.pop(digest, None)
            raise
        self._known[digest] = found = self._noted(principal, values)
        self._known.move_to_end(digest)
        if len(self._known) > MAX_KEYS:
            self._known.popitem(last=False)
        return found

    def _noted(self, principal: Principal, values: Values) -> Known:
        now = time.monotonic()
        if len(values) < 2 or values[0] is None:  # its tenant was not known: all is asked again
            return Known(principal, values, True, now, 0.0)
        expires_at = ApiKey.model_validate_json(values[0]).expires_at
        expires = expires_at.timestamp() if expires_at is not None else math.inf
        is_limited = self._limits.parsed(values[1]).requests_per_minute > 0
        # Later the store notes again that the key is in use.
        return Known(principal, values, is_limited, now, min(expires, time.time() + USE_STEP_S))
