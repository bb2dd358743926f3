"""The workers that live, as they say themselves with each heartbeat."""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import Any, Literal

from redis import Redis

from app.core.changes.redis_keys import WORKERS, WORKERS_STAMP, worker_key
from app.core.changes.stamps import KEPT_S
from app.core.planning.device_profile import Basis, DeviceProfile
from app.core.records.specs import Kept


class WorkerRecord(Kept):
    """One worker: where it runs and what it does."""

    name: str
    host: str
    pid: int
    device: str  # cpu, cuda:0
    device_name: str = ""
    profile: DeviceProfile | None = None  # None as long as nothing is measured
    measuring: bool = False  # its device, while it waits for jobs
    queue: Literal["jobs", "serve"] = "jobs"
    engines: tuple[str, ...] = ()  # that a worker of the queue `serve` can run
    servers: int = 0  # that it runs
    slots: int = 0  # how many it may run; 0 of a worker of an earlier version
    memory_bytes: int | None = None  # in use on its device; without a GPU the host's
    memory_total: int | None = None
    job: str | None = None
    tenant: str | None = None  # the job's
    started_at: datetime
    heartbeat_at: datetime

    @property
    def state(self) -> Literal["idle", "measuring", "busy"]:
        if self.job is not None or self.servers:
            return "busy"
        return "measuring" if self.measuring else "idle"

    @property
    def rates(self) -> Basis | None:
        """What predictions for its device rest on; None for a worker that runs no jobs."""
        if self.queue != "jobs":
            return None
        return "nominal" if self.profile is None else self.profile.basis


class WorkerRegistry:
    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable

    def beat(self, record: WorkerRecord, *, ttl_s: float) -> None:
        """Say that the worker lives, for `ttl_s` seconds."""
        now, _ = self._redis.time()  # the hosts' clocks may differ
        pipe = self._redis.pipeline()
        pipe.set(worker_key(record.name), record.model_dump_json(), px=int(ttl_s * 1000))
        pipe.zadd(WORKERS, {record.name: now + ttl_s})
        pipe.zremrangebyscore(WORKERS, "-inf", now - 60)
        pipe.set(WORKERS_STAMP, secrets.token_hex(8), ex=KEPT_S)
        pipe.execute()

    def remove(self, name: str) -> None:
        """Remove a worker that ends normally."""
        pipe = self._redis.pipeline()
        pipe.delete(worker_key(name))
        pipe.zrem(WORKERS, name)
        pipe.set(WORKERS_STAMP, secrets.token_hex(8), ex=KEPT_S)
        pipe.execute()

    def living(self) -> list[WorkerRecord]:
        """The workers whose last heartbeat has not expired, by name."""
        names = [name.decode() for name in self._redis.zrange(WORKERS, 0, -1)]
        records = self._redis.mget([worker_key(name) for name in names]) if names else []
        workers = [WorkerRecord.of_record(record) for record in records if record is not None]
        return sorted(filter(None, workers), key=lambda worker: worker.name)
