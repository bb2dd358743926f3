"""Idempotency keys: the same key and body lead to the same job.

    nibble:idempotency:<tenant>:<digest of the key>    {body, job}, for a day

The job's id is fixed together with the key, before the job exists. A request that died half-way is so
completed by its repetition, and of fifty parallel ones just one creates the record.
"""

from __future__ import annotations

import hashlib
from typing import Any

from redis import Redis

from app.core.errors import InvalidRequest, MalformedRequest
from app.core.ids import new_id
from app.core.specs import Frozen, JobSpec

KEPT_S = 24 * 3600
MAX_LENGTH = 255


class Claim(Frozen):
    """The first request with a key: a digest of its body, and the id of its job."""

    body: str
    job: str


class IdempotencyKeys:
    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable

    def job_id(self, tenant: str, key: str, spec: JobSpec) -> str:
        """The id of the job that this key stands for.

        Raises MalformedRequest for an unusable key, InvalidRequest if the key was used with another body.
        """
        if not 1 <= len(key) <= MAX_LENGTH or not key.isascii() or not key.isprintable():
            raise MalformedRequest(
                f"Idempotency-Key has {len(key)} characters; 1 to {MAX_LENGTH} printable ones are allowed",
                code="idempotency_key_invalid",
                remedy="use a UUID",
            )
        mine = Claim(body=hashlib.sha256(spec.model_dump_json().encode()).hexdigest(), job=new_id("job"))
        name = f"nibble:idempotency:{tenant}:{hashlib.sha256(key.encode()).hexdigest()}"
        is_first = self._redis.set(name, mine.model_dump_json(), nx=True, ex=KEPT_S)
        first = mine if is_first else Claim.model_validate_json(self._redis.get(name))
        if first.body != mine.body:
            raise InvalidRequest(
                "this Idempotency-Key was used with another body",
                code="idempotency_key_reused",
                remedy="use a new key for a new request",
            )
        return first.job
