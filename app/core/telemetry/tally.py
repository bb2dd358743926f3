"""Counts that workers make and every API process shows."""

from __future__ import annotations

from typing import Any, NamedTuple

from redis import Redis

from app.core.changes.redis_keys import FAILURES, STAGES


class StageTotal(NamedTuple):
    times: int
    seconds: float


class Tally:
    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable

    def add_stage(self, stage: str, seconds: float) -> None:
        """Count a finished stage of an attempt and its seconds."""
        pipe = self._redis.pipeline()
        pipe.hincrby(STAGES, f"{stage}:count", 1)
        pipe.hincrbyfloat(STAGES, f"{stage}:seconds", seconds)
        pipe.execute()

    def stages(self) -> dict[str, StageTotal]:
        totals = {name.decode(): value for name, value in self._redis.hgetall(STAGES).items()}
        names = sorted({name.partition(":")[0] for name in totals})
        return {
            name: StageTotal(int(totals.get(f"{name}:count", 0)), float(totals.get(f"{name}:seconds", 0)))
            for name in names
        }

    def failures(self) -> dict[str, int]:
        return {code.decode(): int(count) for code, count in self._redis.hgetall(FAILURES).items()}
