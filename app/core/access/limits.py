"""Limits of tenants, and their use.

0 is no limit. The script that creates a job enforces the limit of active jobs, turns.py that of running ones.
"""

from __future__ import annotations

import math
import time
from typing import Any

from pydantic import Field
from redis import Redis

from app.core.changes.atomic_changes import NOW, Script
from app.core.changes.redis_keys import COUNTED, active_key, limits_key, rate_key, usage_key
from app.core.errors import QuotaExceeded, RateLimited
from app.core.records.specs import Frozen
from app.core.settings import Settings

REREAD_S = 2.0  # how long a process caches the limits

# Returns the seconds to wait as text, or 0.
ADMIT = Script(
    keys=("rate",),
    args=("seconds_each", "burst_seconds"),
    body=f"""
{NOW}
local time = now()
local due = math.max(tonumber(redis.call('GET', rate) or '0'), time)
local wait = due + seconds_each - time - burst_seconds
if wait > 0 then return tostring(wait) end
due = due + seconds_each
redis.call('SET', rate, string.format('%.6f', due), 'PX', math.ceil((due - time) * 1000))
return '0'
""",
)


class Limits(Frozen):
    """The most that a tenant may use."""

    active_jobs: int = Field(default=0, ge=0)
    running_jobs: int = Field(default=0, ge=0)
    storage_bytes: int = Field(default=0, ge=0)
    requests_per_minute: int = Field(default=0, ge=0, le=10_000_000)


class TenantLimits:
    """Limits and use of each tenant."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable
        self._admit = ADMIT.on(redis)
        self._read: dict[str, tuple[float, Limits]] = {}
        self._defaults = Limits(
            active_jobs=settings.tenant_jobs,
            running_jobs=settings.tenant_running_jobs,
            storage_bytes=settings.tenant_storage_bytes,
            requests_per_minute=settings.tenant_requests_per_minute,
        )

    def of(self, tenant: str) -> Limits:
        last = self._read.get(tenant)
        if last is not None and time.monotonic() - last[0] < REREAD_S:
            return last[1]
        limits = self.parsed(self._redis.get(limits_key(tenant)))
        self._read[tenant] = (time.monotonic(), limits)
        return limits

    def parsed(self, record: bytes | None) -> Limits:
        """The limits of a tenant with this record."""
        return Limits.model_validate_json(record) if record is not None else self._defaults

    def set(self, tenant: str, limits: Limits) -> None:
        self._redis.set(limits_key(tenant), limits.model_dump_json())
        self._read.pop(tenant, None)

    def count_request(self, tenant: str) -> None:
        """Raises RateLimited beyond the tenant's rate; what ten seconds allow may come at once."""
        rate = self.of(tenant).requests_per_minute
        if rate == 0:
            return
        seconds = 60.0 / rate
        wait = float(
            self._admit(rate=rate_key(tenant), seconds_each=seconds, burst_seconds=max(10.0, seconds))
        )
        if wait > 0:
            raise RateLimited(
                f"the tenant {tenant} may send {rate} requests per minute",
                remedy="wait as long as Retry-After says; poll with `Prefer: wait=N`, or follow the events",
                retry_after_s=math.ceil(wait),
            )

    def require_storage(self, tenant: str) -> None:
        """Raises QuotaExceeded if the tenant's artifacts and datasets fill what it may store."""
        most = self.of(tenant).storage_bytes
        used = self.stored_bytes(tenant) if most else 0
        if used >= most > 0:
            raise QuotaExceeded(
                f"the artifacts and datasets of the tenant {tenant} take {used} bytes; the limit is {most}",
                code="storage_quota_exceeded",
                remedy="delete artifacts or datasets, or let the operator raise the limit",
            )

    def stored_bytes(self, tenant: str) -> int:
        return sum(self.stored(tenant).values())

    def stored(self, tenant: str) -> dict[str, int]:
        """The bytes of each artifact and dataset that is counted, by its id."""
        sizes = self._redis.hgetall(usage_key(tenant))
        return {name.decode(): int(size) for name, size in sizes.items()}

    def active_jobs(self, tenant: str) -> int:
        return int(self._redis.scard(active_key(tenant)))

    def artifacts(self, tenant: str) -> list[str] | None:
        """The ids of the tenant's artifacts; None until a collection of garbage has counted all there are."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.exists(COUNTED)
        pipe.hkeys(usage_key(tenant))
        are_counted, ids = pipe.execute()
        return sorted(artifact.decode() for artifact in ids) if are_counted else None

    def all_are_counted(self) -> None:
        """From now on the artifacts that are counted are all there are."""
        self._redis.set(COUNTED, 1)

    def add_artifact(self, tenant: str, artifact_id: str, size: int) -> None:
        self._redis.hset(usage_key(tenant), artifact_id, size)

    def remove_artifact(self, tenant: str, artifact_id: str) -> None:
        self._redis.hdel(usage_key(tenant), artifact_id)
