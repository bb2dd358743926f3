"""Deployment records and the slots of their replicas, in Redis.

Whoever claims a slot first serves it until the claim expires: two servers never share one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from redis import Redis

from app.core.changes.atomic_changes import Script, versioned_update
from app.core.changes.redis_keys import (
    DEPLOYMENT_CHANGES,
    DEPLOYMENTS,
    DEPLOYMENTS_STAMP,
    deployment_key,
    deployment_names_key,
    deployment_used_key,
    slot_key,
)
from app.core.changes.stamps import STAMP
from app.core.deployments.deployment import Deployment, DeploymentSpec, LiveDeployment, Replica
from app.core.errors import Conflict, NotFound, RecordUnreadable
from app.core.records.ids import is_id, new_id
from app.core.records.serving_options import MOST_IDLE_S

# The first name of a JSON list that another deployment has, with its id.
TAKEN = """
local function taken(names, list, id)
  for _, name in ipairs(cjson.decode(list)) do
    local holder = redis.call('HGET', names, name)
    if holder and holder ~= id then return {name, holder} end
  end
end
"""

# Returns nothing, or the name that is taken and its holder.
CREATE = Script(
    keys=("deployment", "names", "all"),
    args=("id", "record", "claimed"),
    body=f"""
{STAMP}{TAKEN}
if redis.call('EXISTS', deployment) == 1 then return {{}} end
local conflict = taken(names, claimed, id)
if conflict then return conflict end
redis.call('HSET', deployment, 'record', record, 'version', 1)
for _, name in ipairs(cjson.decode(claimed)) do redis.call('HSET', names, name, id) end
redis.call('SADD', all, id)
stamp('{DEPLOYMENTS_STAMP}')
redis.call('PUBLISH', '{DEPLOYMENT_CHANGES}', id)
return {{}}
""",
)

# Returns whether the version was the one to be replaced, or the name that is taken and its holder.
SWAP = Script(
    keys=("deployment", "names"),
    args=("id", "version", "record", "claimed", "freed"),
    body=f"""
{STAMP}{TAKEN}
if redis.call('HGET', deployment, 'version') ~= version then return 0 end
local conflict = taken(names, claimed, id)
if conflict then return conflict end
redis.call('HSET', deployment, 'record', record)
redis.call('HINCRBY', deployment, 'version', 1)
stamp('{DEPLOYMENTS_STAMP}')
for _, name in ipairs(cjson.decode(claimed)) do redis.call('HSET', names, name, id) end
for _, name in ipairs(cjson.decode(freed)) do
  if redis.call('HGET', names, name) == id then redis.call('HDEL', names, name) end
end
redis.call('PUBLISH', '{DEPLOYMENT_CHANGES}', id)
return 1
""",
)

# Does nothing while a slot is held.
FORGET = Script(
    keys=("deployment", "used", "all"),
    more_keys="slots",
    args=("id",),
    body=f"""
{STAMP}
for _, slot in ipairs(slots) do
  if redis.call('EXISTS', slot) == 1 then return 0 end
end
redis.call('DEL', deployment, used)
redis.call('SREM', all, id)
stamp('{DEPLOYMENTS_STAMP}')
redis.call('PUBLISH', '{DEPLOYMENT_CHANGES}', id)
return 1
""",
)

# Also takes a free slot.
BEAT = Script(
    keys=("slot",),
    args=("owner", "record", "milliseconds", "deployment", "announce"),
    body=f"""
{STAMP}
local present = redis.call('GET', slot)
if present and cjson.decode(present).owner ~= owner then return 0 end
redis.call('SET', slot, record, 'PX', milliseconds)
if present ~= record then stamp('{DEPLOYMENTS_STAMP}') end
if not present or announce == '1' then redis.call('PUBLISH', '{DEPLOYMENT_CHANGES}', deployment) end
return 1
""",
)

RELEASE = Script(
    keys=("slot",),
    args=("owner", "deployment"),
    body=f"""
{STAMP}
local present = redis.call('GET', slot)
if not present or cjson.decode(present).owner ~= owner then return 0 end
redis.call('DEL', slot)
stamp('{DEPLOYMENTS_STAMP}')
redis.call('PUBLISH', '{DEPLOYMENT_CHANGES}', deployment)
return 1
""",
)


def slot_keys(deployment: Deployment) -> list[str]:
    return [slot_key(deployment.id, slot) for slot in deployment.slots]


def missing(deployment_id: str) -> NotFound:
    return NotFound(
        f"there is no deployment {deployment_id[:64]}",
        code="deployment_not_found",
        remedy="list your deployments with GET /v1/deployments",
    )


def name_taken(name: str, holder: str) -> Conflict:
    return Conflict(
        f"the deployment {holder} has the name {name!r} already",
        code="deployment_name_taken",
        remedy="choose another name, or delete that deployment first",
        param="name",
    )


def record_of(deployment: Deployment) -> str:
    """The record as kept: without what is as usual, so that an older version reads what it understands."""
    return deployment.model_dump_json(exclude_defaults=True)


class DeploymentStore:
    """Reads and writes deployments, for the API and the workers."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable
        self._create, self._swap, self._forget = CREATE.on(redis), SWAP.on(redis), FORGET.on(redis)
        self._beat, self._release = BEAT.on(redis), RELEASE.on(redis)

    def create(
        self, tenant: str, spec: DeploymentSpec, *, deployment_id: str | None = None, job: str | None = None
    ) -> Deployment:
        """Record a deployment. Raises Conflict if the tenant uses one of its names already.

        Returns the existing deployment if `deployment_id` was used before.
        """
        deployment = Deployment(
            id=deployment_id or new_id("dep"),
            tenant=tenant,
            spec=spec,
            created_at=datetime.now(UTC),
            job=job,
        )
        conflict = self._create(
            deployment=deployment_key(deployment.id),
            names=deployment_names_key(tenant),
            all=DEPLOYMENTS,
            id=deployment.id,
            record=record_of(deployment),
            claimed=json.dumps(deployment.names),
        )
        if conflict:
            raise name_taken(*(word.decode() for word in conflict))
        return self.load(deployment.id)

    def require_free(self, tenant: str, names: Sequence[str]) -> None:
        """Raise Conflict if the tenant has one of the names in use."""
        holders = self._redis.hmget(deployment_names_key(tenant), names)
        for name, holder in zip(names, holders, strict=True):
            if holder is not None:
                raise name_taken(name, holder.decode())

    def load(self, deployment_id: str) -> Deployment:
        return self._read(deployment_id)[0]

    def get(self, tenant: str, deployment_id: str) -> LiveDeployment:
        """The deployment with its replicas; NotFound also for another tenant's."""
        deployment = self.load(deployment_id)
        if deployment.tenant != tenant:
            raise missing(deployment_id)
        return self._with_replicas([deployment])[0]

    def all(self) -> list[LiveDeployment]:
        """Every tenant's deployments, newest first."""
        ids = sorted((member.decode() for member in self._redis.smembers(DEPLOYMENTS)), reverse=True)
        pipe = self._redis.pipeline(transaction=False)
        for deployment_id in ids:
            pipe.hget(deployment_key(deployment_id), "record")
        deployments = [Deployment.of_record(record) for record in pipe.execute() if record is not None]
        return self._with_replicas([deployment for deployment in deployments if deployment is not None])

    def update(self, deployment_id: str, change: Callable[[Deployment], Deployment]) -> Deployment:
        """Apply `change` to the record, again from the start if another writer was faster.

        Raises Conflict if the tenant uses one of its new names already.
        """

        def swap(before: Deployment, after: Deployment, version: int) -> bool:
            written = self._swap(
                deployment=deployment_key(deployment_id),
                names=deployment_names_key(before.tenant),
                id=deployment_id,
                version=version,
                record=record_of(after),
                claimed=json.dumps([name for name in after.names if name not in before.names]),
                freed=json.dumps([name for name in before.names if name not in after.names]),
            )
            if isinstance(written, list):
                raise name_taken(*(word.decode() for word in written))
            return bool(written)

        return versioned_update(
            f"deployment {deployment_id}", lambda: self._read(deployment_id), change, swap
        )

    def forget(self, deployment: Deployment) -> bool:
        """Remove the record, unless a server still runs."""
        forgotten = self._forget(
            deployment=deployment_key(deployment.id),
            used=deployment_used_key(deployment.id),
            all=DEPLOYMENTS,
            slots=slot_keys(deployment),
            id=deployment.id,
        )
        return bool(forgotten)

    def beat(self, replica: Replica, *, ttl_s: float, announce: bool = False) -> bool:
        """Hold the replica's slot for `ttl_s` more seconds; False if another worker holds it."""
        return bool(
            self._beat(
                slot=slot_key(replica.deployment, replica.slot),
                owner=replica.owner,
                record=replica.model_dump_json(),
                milliseconds=int(ttl_s * 1000),
                deployment=replica.deployment,
                announce=int(announce),
            )
        )

    def release(self, replica: Replica) -> bool:
        slot = slot_key(replica.deployment, replica.slot)
        return bool(self._release(slot=slot, owner=replica.owner, deployment=replica.deployment))

    def touch(self, deployments: Iterable[Deployment]) -> None:
        """Record that the deployments were used just now, also those that are never idle: that may change."""
        pipe = self._redis.pipeline(transaction=False)
        for deployment in deployments:
            pipe.set(deployment_used_key(deployment.id), 1, ex=MOST_IDLE_S)
        pipe.execute()

    def was_used(self, deployment: Deployment) -> bool:
        """Whether the last request came within the idle timeout, by the clock of Redis."""
        left_ms = self._redis.pttl(deployment_used_key(deployment.id))  # negative: none came for MOST_IDLE_S
        timeout_s = deployment.spec.idle_timeout_s or MOST_IDLE_S
        return bool(left_ms > (MOST_IDLE_S - timeout_s) * 1000)

    def _read(self, deployment_id: str) -> tuple[Deployment, int]:
        if not is_id("dep", deployment_id):
            raise missing(deployment_id)
        record, version = self._redis.hmget(deployment_key(deployment_id), "record", "version")
        if record is None:
            raise missing(deployment_id)
        deployment = Deployment.of_record(record)
        if deployment is None:
            raise RecordUnreadable(
                f"deployment {deployment_id} was recorded by another version of the service",
                remedy="finish the upgrade; processes of the newer version can read it",
            )
        return deployment, int(version)

    def _with_replicas(self, deployments: list[Deployment]) -> list[LiveDeployment]:
        keys = [key for deployment in deployments for key in slot_keys(deployment)]
        records = iter(self._redis.mget(keys) if keys else [])
        live = []
        for deployment in deployments:
            slots = [next(records) for _ in deployment.slots]
            replicas = [Replica.of_record(record) for record in slots if record is not None]
            readable = tuple(replica for replica in replicas if replica is not None)
            live.append(LiveDeployment(deployment=deployment, replicas=readable))
        return live
