"""Signed messages about jobs, after the Standard Webhooks specification (standardwebhooks.com).

nibble:delivery:<id>              one message with what became of it, as JSON
nibble:deliveries:<job>           sorted set of a job's messages
nibble:webhooks:due               sorted set of messages by the time of their next try
nibble:webhook-secret:<tenant>    hash: current, previous

A message keeps its id over all tries, so that a receiver can tell a repetition. While a secret is being
replaced, messages carry a signature of each.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from datetime import UTC, datetime
from typing import Any, Literal

from redis import Redis
from ulid import ULID

from app.core.errors import NotFound
from app.core.records.job import Job, JobState
from app.core.records.specs import Kept

DUE = "nibble:webhooks:due"
PREFIX = "whsec_"
# A secret that was replaced signs for this long beside its successor.
ROTATION_S = 24 * 3600
MAX_LISTED = 100


class WebhookTry(Kept):
    """One attempt to deliver: the receiver's status, or why there is none."""

    at: datetime
    status: int | None = None
    error: str | None = None
    seconds: float


class Delivery(Kept):
    """A message. `body` is what is signed and sent, byte by byte."""

    id: str
    job: str
    tenant: str
    type: str
    url: str
    body: str
    created_at: datetime
    state: Literal["pending", "delivered", "failed"] = "pending"
    tries: tuple[WebhookTry, ...] = ()


def message_type(state: JobState) -> str:
    return f"job.{'started' if state is JobState.RUNNING else state}"


def message_of(before: Job | None, after: Job) -> Delivery | None:
    """The message that a change of a job calls for, if its owner wants it."""
    wanted = after.spec.webhook
    if wanted is None or (before is not None and before.state is after.state):
        return None
    kind = message_type(after.state)
    # A second attempt is no second start.
    if kind not in wanted.events or (after.state is JobState.RUNNING and after.attempt > 1):
        return None
    now = datetime.now(UTC)
    body = {"type": kind, "timestamp": now.isoformat().replace("+00:00", "Z"), "data": job_fields(after)}
    return Delivery(
        id=f"msg_{ULID()}",
        job=after.id,
        tenant=after.tenant,
        type=kind,
        url=wanted.url,
        body=json.dumps(body, separators=(",", ":")),
        created_at=now,
    )


def job_fields(job: Job) -> dict[str, Any]:
    """What a message tells of a job: enough to go on, the rest is behind the API."""
    told = job.model_dump(
        mode="json",
        include={"id", "state", "attempt", "created_at", "started_at", "finished_at", "error", "artifacts"},
    )
    return {**told, "labels": job.spec.labels, "model": job.spec.model, "link": f"/v1/jobs/{job.id}"}


def signature(secret: str, message_id: str, timestamp: int, body: str) -> str:
    """`v1,` and the HMAC-SHA256 of id, time and body, with the secret's bytes as the key."""
    key = base64.b64decode(secret.removeprefix(PREFIX))
    signed = f"{message_id}.{timestamp}.{body}".encode()
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


class WebhookSecrets:
    """What signs each tenant's messages."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable

    def of(self, tenant: str) -> list[str]:
        """The tenant's secrets, the current one first; made at first use."""
        name = f"nibble:webhook-secret:{tenant}"
        self._redis.hsetnx(name, "current", new_secret())
        current = self._redis.hget(name, "current")
        previous = self._redis.get(f"{name}:previous")
        return [secret.decode() for secret in (current, previous) if secret is not None]

    def rotate(self, tenant: str) -> str:
        """A new secret. The one before signs on for a day, so that receivers can change over."""
        name, fresh = f"nibble:webhook-secret:{tenant}", new_secret()
        before = self.of(tenant)[0]
        pipe = self._redis.pipeline()
        pipe.set(f"{name}:previous", before, ex=ROTATION_S)
        pipe.hset(name, "current", fresh)
        pipe.execute()
        return fresh


def new_secret() -> str:
    return PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


# KEYS: deliveries due. ARGV: seconds for which nobody else takes the message.
TAKE = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1000000
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, 1)
if #due == 0 then return false end
redis.call('ZADD', KEYS[1], now + ARGV[1], due[1])
return due[1]
"""

# KEYS: delivery, deliveries due. ARGV: id, delivery, seconds until the next try or ''.
WRITE = """
if redis.call('SET', KEYS[1], ARGV[2], 'XX', 'KEEPTTL') == false then
  redis.call('ZREM', KEYS[2], ARGV[1])
  return 0
end
if ARGV[3] == '' then
  redis.call('ZREM', KEYS[2], ARGV[1])
else
  local now = redis.call('TIME')
  redis.call('ZADD', KEYS[2], now[1] + now[2] / 1000000 + ARGV[3], ARGV[1])
end
return 1
"""


class DeliveryStore:
    """Messages and their tries. The job store writes them, in the step that changes the job."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable
        self._take = self._redis.register_script(TAKE)
        self._write = self._redis.register_script(WRITE)

    def take(self, *, hold_s: float) -> Delivery | None:
        """A message that is due, which nobody else takes for `hold_s` seconds; None if there is none."""
        taken = self._take(keys=[DUE], args=[hold_s])
        if taken is None:
            return None
        found = self._redis.get(delivery_key(taken.decode()))
        if found is None:  # older than what is kept
            self._redis.zrem(DUE, taken)
            return None
        return Delivery.of_record(found)  # of another version: it stays due, for that one

    def write(self, delivery: Delivery, *, again_in_s: float | None) -> None:
        """Record a try, and when the next one is due."""
        self._write(
            keys=[delivery_key(delivery.id), DUE],
            args=[delivery.id, delivery.model_dump_json(), "" if again_in_s is None else again_in_s],
        )

    def list(self, job_id: str) -> list[Delivery]:
        """A job's messages, oldest first."""
        ids = self._redis.zrange(deliveries_key(job_id), 0, MAX_LISTED - 1)
        found = self._redis.mget([delivery_key(known.decode()) for known in ids]) if ids else []
        deliveries = [Delivery.of_record(record) for record in found if record is not None]
        return [delivery for delivery in deliveries if delivery is not None]

    def redeliver(self, job_id: str, delivery_id: str) -> Delivery:
        """Have a message sent again, under its old id. NotFound if the job has no such message."""
        for delivery in self.list(job_id):
            if delivery.id == delivery_id:
                pending = delivery.model_copy(update={"state": "pending"})
                self.write(pending, again_in_s=0.0)
                return pending
        raise NotFound(
            f"job {job_id} has no delivery {delivery_id[:64]}",
            code="delivery_not_found",
            remedy="list them with GET /v1/jobs/{id}/webhook-deliveries",
        )


def delivery_key(delivery_id: str) -> str:
    return f"nibble:delivery:{delivery_id}"


def deliveries_key(job_id: str) -> str:
    return f"nibble:deliveries:{job_id}"
