"""Idempotency keys: the same key and request lead to the same job, deployment or API key.

The id is stored with the key before the record exists. So a repetition completes a request that died
half-way, and of fifty parallel requests only one creates the record. A deleted record is not created again:
other records named after its id may still exist.
"""

from __future__ import annotations

from typing import Any

from redis import Redis

from app.core.changes.redis_keys import digest, idempotency_key, spent_key
from app.core.errors import Conflict, InvalidRequest, MalformedRequest
from app.core.records.specs import Kept

KEPT_S = 24 * 3600
MAX_LENGTH = 255


class Claim(Kept):
    """The first request with a key: its digest, and the id of the record that it creates."""

    body: str
    job: str  # or deployment, or API key


class IdempotencyKeys:
    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable

    def find(self, tenant: str, key: str | None, request: str) -> str | None:
        """The id that this key stands for; None for a new key, or without one. `request` is the body.

        Raises MalformedRequest for an unusable key, InvalidRequest if the key was used for something else,
        Conflict if its record was deleted.
        """
        record = self._redis.get(checked_key(tenant, key)) if key is not None else None
        if record is None:
            return None
        claimed_id = matching(Claim.model_validate_json(record), request)
        if self._redis.exists(spent_key(claimed_id)):
            raise Conflict(
                f"this Idempotency-Key has made {claimed_id}, which was deleted since",
                code="idempotency_key_spent",
                remedy="use a new key to make another one",
            )
        return claimed_id

    def claim(self, tenant: str, key: str | None, request: str, fresh: str) -> str:
        """The id that this key stands for from now on: `fresh`, if the key is new or there is none."""
        if key is None:
            return fresh
        mine = Claim(body=digest(request), job=fresh)
        is_first = self._redis.set(checked_key(tenant, key), mine.model_dump_json(), nx=True, ex=KEPT_S)
        return fresh if is_first else self.find(tenant, key, request) or fresh

    def spend(self, claimed_id: str) -> None:
        """Mark the id as deleted, so that no key creates it again."""
        self._redis.set(spent_key(claimed_id), 1, ex=KEPT_S)


def checked_key(tenant: str, key: str) -> str:
    if not 1 <= len(key) <= MAX_LENGTH or not key.isascii() or not key.isprintable():
        raise MalformedRequest(
            f"Idempotency-Key has {len(key)} characters; 1 to {MAX_LENGTH} printable ones are allowed",
            code="idempotency_key_invalid",
            remedy="use a UUID",
        )
    return idempotency_key(tenant, key)


def matching(first: Claim, request: str) -> str:
    if first.body != digest(request):
        raise InvalidRequest(
            "this Idempotency-Key was used with another body",
            code="idempotency_key_reused",
            remedy="use a new key for a new request",
        )
    return first.job
