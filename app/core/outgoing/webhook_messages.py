"""Signed messages about jobs, after the Standard Webhooks specification (standardwebhooks.com).

A message keeps its id over all tries, so that a receiver can tell a repetition. While a secret is being
replaced, messages carry a signature of each.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from redis import Redis

from app.core.changes.atomic_changes import NOW, Script
from app.core.changes.redis_keys import (
    DUE,
    deliveries_key,
    delivery_key,
    tenant_deliveries_key,
    webhook_secret_key,
)
from app.core.errors import NotFound
from app.core.records.ids import new_id
from app.core.records.job import Job, JobState
from app.core.records.specs import Kept

PREFIX = "whsec_"
# A secret that was replaced signs for this long beside its successor.
ROTATION_S = 24 * 3600
MAX_LISTED = 100
MAX_OF_TENANT = 1000  # messages that can be listed over all its jobs


DeliveryState = Literal["pending", "delivered", "failed"]


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
    state: DeliveryState = "pending"
    tries: tuple[WebhookTry, ...] = ()


def message_type(state: JobState) -> str:
    return f"job.{'started' if state is JobState.RUNNING else state}"


def message_of(before: Job | None, after: Job) -> Delivery | None:
    """The message that a change of a job calls for, if its owner wants it."""
    webhook = after.spec.webhook
    if webhook is None or (before is not None and before.state is after.state):
        return None
    kind = message_type(after.state)
    # A second attempt is no second start.
    if kind not in webhook.events or (after.state is JobState.RUNNING and after.attempt > 1):
        return None
    return delivery(after, webhook.url, kind, job_fields(after))


def delivery(job: Job, url: str, kind: str, fields: dict[str, Any]) -> Delivery:
    """A message of this kind about a job, or about one of its artifacts."""
    now = datetime.now(UTC)
    body = {"type": kind, "timestamp": now.isoformat().replace("+00:00", "Z"), "data": fields}
    return Delivery(
        id=new_id("msg"),
        job=job.id,
        tenant=job.tenant,
        type=kind,
        url=url,
        body=json.dumps(body, separators=(",", ":")),
        created_at=now,
    )


def job_fields(job: Job) -> dict[str, Any]:
    """The fields of a job in a message; the API has the rest."""
    fields = job.model_dump(
        mode="json",
        include={"id", "state", "attempt", "created_at", "started_at", "finished_at", "error", "artifacts"},
    )
    return {**fields, "labels": job.spec.labels, "model": job.spec.model, "link": f"/v1/jobs/{job.id}"}


def signature(secret: str, message_id: str, timestamp: int, body: str) -> str:
    """`v1,` and the HMAC-SHA256 of id, time and body, with the secret's bytes as the key."""
    key = base64.b64decode(secret.removeprefix(PREFIX))
    signed = f"{message_id}.{timestamp}.{body}".encode()
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


class WebhookSecrets:
    """The secrets that sign each tenant's messages."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable

    def of(self, tenant: str) -> list[str]:
        """The tenant's secrets, the current one first; made at first use."""
        name = webhook_secret_key(tenant)
        self._redis.hsetnx(name, "current", new_secret())
        current = self._redis.hget(name, "current")
        previous = self._redis.get(f"{name}:previous")
        return [secret.decode() for secret in (current, previous) if secret is not None]

    def rotate(self, tenant: str) -> str:
        """Create a new secret. The previous one also signs for a day, so that receivers can switch."""
        name, fresh = webhook_secret_key(tenant), new_secret()
        before = self.of(tenant)[0]
        pipe = self._redis.pipeline()
        pipe.set(f"{name}:previous", before, ex=ROTATION_S)
        pipe.hset(name, "current", fresh)
        pipe.execute()
        return fresh


def new_secret() -> str:
    return PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


TAKE = Script(
    keys=("due",),
    args=("hold_s",),  # for which nobody else takes the message
    body=f"""
{NOW}
local time = now()
local first = redis.call('ZRANGEBYSCORE', due, '-inf', time, 'LIMIT', 0, 1)[1]
if not first then return false end
redis.call('ZADD', due, time + hold_s, first)
return first
""",
)

WRITE = Script(
    keys=("delivery", "due"),
    args=("id", "message", "again_in_s"),  # '' for no further try
    body=f"""
{NOW}
if redis.call('SET', delivery, message, 'XX', 'KEEPTTL') == false then
  redis.call('ZREM', due, id)
  return 0
end
if again_in_s == '' then
  redis.call('ZREM', due, id)
else
  redis.call('ZADD', due, now() + again_in_s, id)
end
return 1
""",
)


class DeliveryStore:
    """Messages and their tries. The job store writes them, in the step that changes the job."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable
        self._take, self._write = TAKE.on(redis), WRITE.on(redis)

    def take(self, *, hold_s: float) -> Delivery | None:
        """A message that is due, which nobody else takes for `hold_s` seconds; None if there is none."""
        taken = self._take(due=DUE, hold_s=hold_s)
        if taken is None:
            return None
        record = self._redis.get(delivery_key(taken.decode()))
        if record is None:  # older than what is kept
            self._redis.zrem(DUE, taken)
            return None
        return Delivery.of_record(record)  # of another version: it stays due, for that one

    def write(self, delivery: Delivery, *, again_in_s: float | None) -> None:
        """Record a try, and when the next one is due."""
        self._write(
            delivery=delivery_key(delivery.id),
            due=DUE,
            id=delivery.id,
            message=delivery.model_dump_json(),
            again_in_s=again_in_s,
        )

    def list(self, job_id: str) -> Sequence[Delivery]:
        """A job's messages, oldest first."""
        return self._read(self._redis.zrange(deliveries_key(job_id), 0, MAX_LISTED - 1))

    def page(
        self, tenant: str, *, limit: int, before: str | None, state: DeliveryState | None = None
    ) -> Sequence[Delivery]:
        """The tenant's messages before the id `before`, newest first; of one state, if it is named."""
        newest = "+" if before is None else f"({before}"
        listed: Sequence[Delivery] = []
        while ids := self._redis.zrevrangebylex(tenant_deliveries_key(tenant), newest, "-", 0, MAX_LISTED):
            listed = [*listed, *(each for each in self._read(ids) if state in (None, each.state))]
            if len(listed) >= limit:
                break
            newest = f"({ids[-1].decode()}"
        return listed[:limit]

    def _read(self, ids: Sequence[bytes]) -> Sequence[Delivery]:
        """The messages of these ids; those that are older than what is kept are left out."""
        records = self._redis.mget([delivery_key(each.decode()) for each in ids]) if ids else []
        deliveries = [Delivery.of_record(record) for record in records if record is not None]
        return [delivery for delivery in deliveries if delivery is not None]

    def redeliver(self, job_id: str, delivery_id: str) -> Delivery:
        """Send a message again, under its old id. Raises NotFound if the job has no such message."""
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
