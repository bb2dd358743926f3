"""Idempotency keys: the same key and request lead to the same job, deployment or API key.

    nibble:idempotency:<tenant>:<digest of the key>    {body, job}, for a day
    nibble:idempotency-spent:<id>                      what a key stood for was deleted, for a day

The id of what is made is fixed together with the key, before it exists. A request that died half-way is so
completed by its repetition, and of fifty parallel ones just one creates the record. What was deleted since is
not made again: what is named after its id may live on.
"""

from __future__ import annotations

import hashlib
from typing import Any

from redis import Redis

from app.core.errors import Conflict, InvalidRequest, MalformedRequest
from app.core.records.specs import Kept

KEPT_S = 24 * 3600
MAX_LENGTH = 255


class Claim(Kept):
    """The first request with a key: a digest of it, and the id of what it makes."""

    body: str
    job: str  # or deployment, or API key


class IdempotencyKeys:
    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable

    def find(self, tenant: str, key: str, request: str) -> str | None:
        """The id that this key stands for; None for a new key. `request` tells what is asked for.

        Raises MalformedRequest for an unusable key, InvalidRequest if the key was used for something else,
        Conflict if what it made is deleted.
        """
        found = self._redis.get(redis_key(tenant, key))
        if found is None:
            return None
        made = matching(Claim.model_validate_json(found), request)
        if self._redis.exists(spent_key(made)):
            raise Conflict(
                f"this Idempotency-Key has made {made}, which was deleted since",
                code="idempotency_key_spent",
                remedy="use a new key to make another one",
            )
        return made

    def claim(self, tenant: str, key: str, request: str, fresh: str) -> str:
        """The id that this key stands for from now on: `fresh`, if the key is new."""
        mine = Claim(body=digest(request), job=fresh)
        is_first = self._redis.set(redis_key(tenant, key), mine.model_dump_json(), nx=True, ex=KEPT_S)
        return fresh if is_first else self.find(tenant, key, request) or fresh

    def spend(self, made: str) -> None:
        """Have no key make this again: it is deleted."""
        self._redis.set(spent_key(made), 1, ex=KEPT_S)


def digest(request: str) -> str:
    return hashlib.sha256(request.encode()).hexdigest()


def spent_key(made: str) -> str:
    return f"nibble:idempotency-spent:{made}"


def redis_key(tenant: str, key: str) -> str:
    if not 1 <= len(key) <= MAX_LENGTH or not key.isascii() or not key.isprintable():
        raise MalformedRequest(
            f"Idempotency-Key has {len(key)} characters; 1 to {MAX_LENGTH} printable ones are allowed",
            code="idempotency_key_invalid",
            remedy="use a UUID",
        )
    return f"nibble:idempotency:{tenant}:{hashlib.sha256(key.encode()).hexdigest()}"


def matching(first: Claim, request: str) -> str:
    if first.body != digest(request):
        raise InvalidRequest(
            "this Idempotency-Key was used with another body",
            code="idempotency_key_reused",
            remedy="use a new key for a new request",
        )
    return first.job
