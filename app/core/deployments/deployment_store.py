"""Deployment records and the slots of their replicas, in Redis.

nibble:deployment:<id>              hash: record (JSON), version
nibble:deployments                  set of ids
nibble:deployment-names:<tenant>    hash from name to id
nibble:replica:<deployment>:<slot>  the replica that holds the slot, as JSON, with an expiry
nibble:deployment-used:<id>         exists while the last request is younger than the idle timeout
nibble:deployment-changes           channel: the id of each deployment that changed

Whoever claims a slot first serves it until the claim expires: two servers never share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from redis import Redis

from app.core.changes.stamps import STAMP
from app.core.deployments.deployment import Deployment, DeploymentSpec, Goal, LiveDeployment, Replica
from app.core.errors import Conflict, NotFound, RecordUnreadable
from app.core.records.ids import is_id, new_id
from app.core.records.job import Problem
from app.core.records.job_keys import DEPLOYMENTS

CHANGES = "nibble:deployment-changes"
ALL = "nibble:deployments"
MAX_COLLISIONS = 50

# KEYS: deployment, names, all. ARGV: id, record, name. Gives the id that holds the name.
CREATE = f"""
{STAMP}
local holder = redis.call('HGET', KEYS[2], ARGV[3])
if holder then return holder end
if redis.call('EXISTS', KEYS[1]) == 1 then return ARGV[1] end
redis.call('HSET', KEYS[1], 'record', ARGV[2], 'version', 1)
redis.call('HSET', KEYS[2], ARGV[3], ARGV[1])
redis.call('SADD', KEYS[3], ARGV[1])
stamp('{DEPLOYMENTS}')
redis.call('PUBLISH', '{CHANGES}', ARGV[1])
return ARGV[1]
"""

# KEYS: deployment, names. ARGV: id, expected version, record, a name that becomes free or ''.
SWAP = f"""
{STAMP}
if redis.call('HGET', KEYS[1], 'version') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'record', ARGV[3])
redis.call('HINCRBY', KEYS[1], 'version', 1)
stamp('{DEPLOYMENTS}')
if ARGV[4] ~= '' and redis.call('HGET', KEYS[2], ARGV[4]) == ARGV[1] then
  redis.call('HDEL', KEYS[2], ARGV[4])
end
redis.call('PUBLISH', '{CHANGES}', ARGV[1])
return 1
"""

# KEYS: deployment, used, all, then each slot. ARGV: id. Does nothing while a slot is held.
FORGET = f"""
{STAMP}
for i = 4, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 1 then return 0 end
end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('SREM', KEYS[3], ARGV[1])
stamp('{DEPLOYMENTS}')
redis.call('PUBLISH', '{CHANGES}', ARGV[1])
return 1
"""

# KEYS: slot. ARGV: owner, record, milliseconds, deployment, 1 to announce. Takes a free slot, too.
BEAT = f"""
{STAMP}
local held = redis.call('GET', KEYS[1])
if held and cjson.decode(held).owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
if held ~= ARGV[2] then stamp('{DEPLOYMENTS}') end
if not held or ARGV[5] == '1' then redis.call('PUBLISH', '{CHANGES}', ARGV[4]) end
return 1
"""

# KEYS: slot. ARGV: owner, deployment.
RELEASE = f"""
{STAMP}
local held = redis.call('GET', KEYS[1])
if not held or cjson.decode(held).owner ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
stamp('{DEPLOYMENTS}')
redis.call('PUBLISH', '{CHANGES}', ARGV[2])
return 1
"""


def deployment_key(deployment_id: str) -> str:
    return f"nibble:deployment:{deployment_id}"


def names_key(tenant: str) -> str:
    return f"nibble:deployment-names:{tenant}"


def used_key(deployment_id: str) -> str:
    return f"nibble:deployment-used:{deployment_id}"


def slot_key(deployment_id: str, slot: int) -> str:
    return f"nibble:replica:{deployment_id}:{slot}"


def slot_keys(deployment: Deployment) -> list[str]:
    return [slot_key(deployment.id, slot) for slot in range(deployment.spec.replicas)]


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


class DeploymentStore:
    """The one way to deployments, for the API and the workers."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable
        self._create = self._redis.register_script(CREATE)
        self._swap = self._redis.register_script(SWAP)
        self._forget = self._redis.register_script(FORGET)
        self._beat = self._redis.register_script(BEAT)
        self._release = self._redis.register_script(RELEASE)

    def create(
        self, tenant: str, spec: DeploymentSpec, *, deployment_id: str | None = None, job: str | None = None
    ) -> Deployment:
        """Record a deployment. Conflict if the tenant has its name in use.

        With an id that was used before, the deployment of then.
        """
        deployment = Deployment(
            id=deployment_id or new_id("dep"),
            tenant=tenant,
            spec=spec,
            created_at=datetime.now(UTC),
            job=job,
        )
        keys = [deployment_key(deployment.id), names_key(tenant), ALL]
        holder = self._create(
            keys=keys, args=[deployment.id, deployment.model_dump_json(), spec.name]
        ).decode()
        if holder != deployment.id:
            raise name_taken(spec.name, holder)
        return self.load(holder)

    def require_free(self, tenant: str, name: str) -> None:
        """Raise Conflict if the tenant has the name in use."""
        holder = self._redis.hget(names_key(tenant), name)
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
        ids = sorted((member.decode() for member in self._redis.smembers(ALL)), reverse=True)
        pipe = self._redis.pipeline(transaction=False)
        for deployment_id in ids:
            pipe.hget(deployment_key(deployment_id), "record")
        found = [Deployment.of_record(record) for record in pipe.execute() if record is not None]
        return self._with_replicas([deployment for deployment in found if deployment is not None])

    def update(self, deployment_id: str, change: Callable[[Deployment], Deployment]) -> Deployment:
        """Apply `change` to the record, again from the start if another writer was faster."""
        for _ in range(MAX_COLLISIONS):
            before, version = self._read(deployment_id)
            after = change(before)
            if after == before:
                return before
            free = before.spec.name if after.goal is Goal.REMOVE else ""
            keys = [deployment_key(deployment_id), names_key(before.tenant)]
            if self._swap(keys=keys, args=[deployment_id, version, after.model_dump_json(), free]):
                return after
        raise Conflict(
            f"deployment {deployment_id} was changed {MAX_COLLISIONS} times while it was to be written",
            code="contended",
            remedy="try again",
        )

    def forget(self, deployment: Deployment) -> bool:
        """Remove the record, unless a server still runs."""
        keys = [deployment_key(deployment.id), used_key(deployment.id), ALL, *slot_keys(deployment)]
        return bool(self._forget(keys=keys, args=[deployment.id]))

    def beat(self, replica: Replica, *, ttl_s: float, announce: bool = False) -> bool:
        """Hold the replica's slot for `ttl_s` more seconds; False if another worker holds it."""
        return bool(
            self._beat(
                keys=[slot_key(replica.deployment, replica.slot)],
                args=[
                    replica.owner,
                    replica.model_dump_json(),
                    int(ttl_s * 1000),
                    replica.deployment,
                    int(announce),
                ],
            )
        )

    def release(self, replica: Replica) -> bool:
        keys = [slot_key(replica.deployment, replica.slot)]
        return bool(self._release(keys=keys, args=[replica.owner, replica.deployment]))

    def touch(self, deployments: Iterable[Deployment]) -> None:
        """Say that the deployments were used just now."""
        pipe = self._redis.pipeline(transaction=False)
        for deployment in deployments:
            if deployment.spec.idle_timeout_s is not None:
                pipe.set(used_key(deployment.id), 1, ex=deployment.spec.idle_timeout_s)
        pipe.execute()

    def was_used(self, deployment: Deployment) -> bool:
        """True if the last request is younger than the idle timeout."""
        return bool(self._redis.exists(used_key(deployment.id)))

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
        found = []
        for deployment in deployments:
            slots = [next(records) for _ in range(deployment.spec.replicas)]
            replicas = [Replica.of_record(record) for record in slots if record is not None]
            known = tuple(replica for replica in replicas if replica is not None)
            found.append(LiveDeployment(deployment=deployment, replicas=known))
        return found


def awakened(deployment: Deployment) -> Deployment:
    """The deployment after a request came for it while it rested."""
    return moved(deployment, Goal.REST, Goal.SERVE)


def resting(deployment: Deployment) -> Deployment:
    return moved(deployment, Goal.SERVE, Goal.REST)


def moved(deployment: Deployment, goal: Goal, to: Goal) -> Deployment:
    return deployment.model_copy(update={"goal": to}) if deployment.goal is goal else deployment


def removed(deployment: Deployment) -> Deployment:
    return deployment.model_copy(update={"goal": Goal.REMOVE})


def failed(deployment: Deployment, error: Problem) -> Deployment:
    if deployment.goal is Goal.REMOVE:
        return deployment
    return deployment.model_copy(update={"error": error})


def set_back(deployment: Deployment, error: Problem) -> Deployment:
    """The deployment after a replica failed while others serve."""
    return deployment.model_copy(update={"setback": error.message})


def loaded(deployment: Deployment, load_s: float | None) -> Deployment:
    """The deployment after a replica became ready."""
    return deployment.model_copy(update={"load_s": load_s, "setback": ""})
