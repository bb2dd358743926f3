"""An attempt's reads and writes of its job, retried while Redis is down, refused once the lease is lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from redis.exceptions import RedisError

from app.core.errors import Conflict, NotFound, RecordUnreadable
from app.core.jobs.job_store import JobStore
from app.core.records.job import Job
from workers.attempts.faults import may_pass
from workers.attempts.watch import Stopped, StopReason, Watch

log = logging.getLogger(__name__)
T = TypeVar("T")

REDIS_PATIENCE_S = 60.0


class AttemptRecord:
    """The record and the events of a claimed job, as this attempt writes them."""

    def __init__(self, store: JobStore, job: Job, watch: Watch) -> None:
        self.store, self.job, self.watch = store, job, watch

    def through_outages(self, ask: Callable[[], T], *, stoppable: bool = True) -> T:
        """Retry `ask` until Redis answers. Raises Stopped if the job is no longer this attempt's."""
        give_up = time.monotonic() + REDIS_PATIENCE_S
        while True:
            if stoppable:
                self.watch.check()
            try:
                return ask()
            except RedisError as fault:
                if not may_pass(fault):
                    raise
                log.warning("redis does not do what it is asked: %s", fault)
                if time.monotonic() > give_up:
                    raise Stopped(StopReason.LEASE_LOST) from fault
            except (Conflict, NotFound, RecordUnreadable) as refusal:
                log.warning("not written: %s", refusal.message, extra={"job": self.job.id})
                raise Stopped(StopReason.LEASE_LOST) from refusal
            time.sleep(0.5)

    def to_the_end(self, ask: Callable[[], T]) -> T:
        """`through_outages` for steps that also run while the job is being stopped."""
        return self.through_outages(ask, stoppable=False)

    def update(self, change: Callable[[Job], Job], *, stoppable: bool = True) -> Job:
        job_id, attempt = self.job.id, self.job.attempt
        return self.through_outages(lambda: self.store.update(job_id, change, attempt), stoppable=stoppable)

    def end(self, change: Callable[[Job], Job]) -> Job | None:
        """Write how the attempt ended; None if it is no longer this attempt's to write."""
        try:
            return self.update(change, stoppable=False)
        except Stopped:
            return None

    def event(self, kind: str, payload: dict[str, Any]) -> None:
        self.through_outages(lambda: self.store.append_event(self.job.id, kind, payload, self.job.attempt))

    def check_lease(self) -> None:
        """Read the lease itself: a process that was suspended for minutes may not know that it lost it."""
        if not self.through_outages(lambda: self.store.holds(self.job.id, self.job.attempt)):
            raise Stopped(StopReason.LEASE_LOST)
