"""Pushes in Redis: due ones are taken under a hold, which each report of progress renews.

If a process dies, its push is due again after the hold, and the next attempt sends only what the hub lacks. A
webhook's delivery is recorded in the step that ends the push.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from redis import Redis

from app.core.changes.atomic_changes import NOW, Script
from app.core.changes.redis_keys import PUSHES_DUE, push_key, pushes_key
from app.core.errors import NotFound
from app.core.outgoing import webhook_messages
from app.core.outgoing.delivery_scripts import (
    DELIVERY_ARGS,
    DELIVERY_KEYS,
    RECORD_DELIVERY,
    delivery_keys,
)
from app.core.outgoing.webhook_messages import Delivery
from app.core.records.ids import is_id
from app.core.records.push import Push, PushState

CREATE = Script(
    keys=("push", "pushes", "pushes_due"),
    args=("id", "record"),
    body=f"""
{NOW}
if redis.call('EXISTS', push) == 1 then return 0 end
redis.call('SET', push, record)
redis.call('ZADD', pushes, 0, id)
redis.call('ZADD', pushes_due, now(), id)
return 1
""",
)

# 0 if another attempt has the push by now, or it has ended, or is gone.
WRITE = Script(
    keys=("push", "pushes_due", *DELIVERY_KEYS),
    args=("id", "attempt", "record", "again_in_s", *DELIVERY_ARGS),
    body=f"""
{NOW}
local current = redis.call('GET', push)
if not current then
  redis.call('ZREM', pushes_due, id)
  return 0
end
local fields = cjson.decode(current)
if fields.attempt ~= tonumber(attempt) then return 0 end
if fields.state == 'pushed' or fields.state == 'failed' then return 0 end
redis.call('SET', push, record)
if again_in_s == '' then
  redis.call('ZREM', pushes_due, id)
else
  redis.call('ZADD', pushes_due, now() + again_in_s, id)
end
{RECORD_DELIVERY}
return 1
""",
)


class PushStore:
    """Records of pushes, and which of them are due."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable
        self._create, self._take, self._write = (
            CREATE.on(redis),
            webhook_messages.TAKE.on(redis),
            WRITE.on(redis),
        )

    def create(self, push: Push) -> bool:
        """Record a push, which is due at once; False if its id exists already."""
        return bool(
            self._create(
                push=push_key(push.id),
                pushes=pushes_key(push.artifact),
                pushes_due=PUSHES_DUE,
                id=push.id,
                record=push.model_dump_json(),
            )
        )

    def get(self, tenant: str, push_id: str, *, artifact: str) -> Push:
        """A push of the artifact. Raises NotFound, also for another tenant's."""
        record = self._redis.get(push_key(push_id)) if is_id("push", push_id) else None
        push = None if record is None else Push.of_record(record)
        if push is None or (push.tenant, push.artifact) != (tenant, artifact):
            raise NotFound(
                f"there is no push {push_id[:64]}",
                code="push_not_found",
                remedy="read the artifact: it lists its pushes",
            )
        return push

    def of(self, artifact_ids: Iterable[str]) -> dict[str, tuple[Push, ...]]:
        """The pushes of each artifact, oldest first."""
        ids = list(artifact_ids)
        pipe = self._redis.pipeline(transaction=False)
        for artifact_id in ids:
            pipe.zrange(pushes_key(artifact_id), 0, -1)
        listed = dict(zip(ids, pipe.execute(), strict=True)) if ids else {}
        every = [push_id.decode() for pushes in listed.values() for push_id in pushes]
        records = self._redis.mget([push_key(push_id) for push_id in every]) if every else []
        read = [Push.of_record(record) for record in records if record is not None]
        pushes = [push for push in read if push is not None]
        return {each: tuple(push for push in pushes if push.artifact == each) for each in ids}

    def take(self, *, hold_s: float) -> Push | None:
        """A push that is due, as a new attempt, which nobody else takes up for `hold_s`; None if none is."""
        taken = self._take(due=PUSHES_DUE, hold_s=hold_s)
        if taken is None:
            return None
        push_id = taken.decode()
        record = self._redis.get(push_key(push_id))
        if record is None:  # its artifact was deleted
            self._redis.zrem(PUSHES_DUE, taken)
            return None
        push = Push.of_record(record)
        if push is None:  # of another version: it stays due, for that one
            return None
        changes = {"state": PushState.PUSHING, "attempt": push.attempt + 1, "sent_bytes": 0, "error": None}
        begun = push.model_copy(update=changes)
        return begun if self.write(begun, attempt=push.attempt, again_in_s=hold_s) else None

    def write(
        self, push: Push, *, attempt: int, again_in_s: float | None, message: Delivery | None = None
    ) -> bool:
        """Write the record, if `attempt` is still the push's, and when it is due; None: never again."""
        return bool(
            self._write(
                push=push_key(push.id),
                pushes_due=PUSHES_DUE,
                id=push.id,
                attempt=attempt,
                record=push.model_dump_json(),
                again_in_s=again_in_s,
                **delivery_keys(push.job, message),
            )
        )

    def forget(self, artifact_id: str) -> list[str]:
        """Remove an artifact's pushes; returns their ids. One that is being sent stops at its next report."""
        ids = [push_id.decode() for push_id in self._redis.zrange(pushes_key(artifact_id), 0, -1)]
        if ids:
            self._redis.delete(*[push_key(push_id) for push_id in ids], pushes_key(artifact_id))
            self._redis.zrem(PUSHES_DUE, *ids)
        return ids
