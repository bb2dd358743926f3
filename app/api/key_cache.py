"""Callers of inference routes by their keys, remembered for a moment: requests do not wait for Redis."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool

from app.core.security import KeyStore, Principal

FRESH_S = 2.0  # a key that is revoked is refused within this time
OFFLINE_S = 300.0  # while Redis does not answer, known keys stay good for so long
MAX_KEYS = 4096


class Known(NamedTuple):
    principal: Principal
    checked: float


class KeyCache:
    """Asks the key store at most every FRESH_S per key."""

    def __init__(self, keys: KeyStore, is_offline: Callable[[], bool]) -> None:
        self._keys = keys
        self._is_offline = is_offline
        self._known: OrderedDict[bytes, Known] = OrderedDict()

    async def authenticate(self, key: str) -> Principal:
        """Whose key this is. Raises Unauthenticated for an unknown one."""
        digest = hashlib.sha256(key.encode()).digest()
        known, now = self._known.get(digest), time.monotonic()
        if known is not None and now - known.checked < (OFFLINE_S if self._is_offline() else FRESH_S):
            return known.principal
        try:
            principal = await run_in_threadpool(self._keys.authenticate, key)
        except RedisError:
            if known is None or now - known.checked > OFFLINE_S:
                raise
            return known.principal
        except BaseException:
            self._known.pop(digest, None)
            raise
        self._known[digest] = Known(principal, now)
        self._known.move_to_end(digest)
        if len(self._known) > MAX_KEYS:
            self._known.popitem(last=False)
        return principal
