"""Turns: which of a tenant's jobs are queued, if the tenant may run so many at a time and no more.

A job that waits in line is in no queue, so it holds up nobody else's. It gets its turn when one of the
tenant's jobs ends. Whoever wrote that end gives the turn; if it died before it could, the sweep of an API
process does. The scripts that record and end jobs keep count of turns and lines (job_scripts).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from redis.exceptions import RedisError

from app.core.errors import NotFound, RecordUnreadable
from app.core.job import JobState
from app.core.job_queue import JobQueue
from app.core.job_store import JobStore

log = logging.getLogger(__name__)


class Turns:
    """Gives turns. `most` tells how many jobs a tenant may run; 0 is no limit."""

    def __init__(self, store: JobStore, queue: JobQueue, most: Callable[[str], int]) -> None:
        self._store = store
        self._queue = queue
        self._most = most

    def give(self, tenant: str) -> None:
        """Queue as many of the jobs in line as the tenant may run."""
        most = self._most(tenant)
        while (job_id := self._store.next_turn(tenant, most)) is not None:
            try:
                job = self._store.load(job_id)
            except (NotFound, RecordUnreadable) as fault:  # a janitor that can read it queues it
                log.warning("a turn is not used: %s", fault.message)
                continue
            if job.state is JobState.QUEUED:
                self._queue.enqueue(job)

    def give_late(self, tenant: str) -> None:
        """As `give`, after a change that stands even if Redis has gone meanwhile."""
        try:
            self.give(tenant)
        except RedisError as fault:
            log.warning("turns of %s are left to the next sweep: %s", tenant, fault)

    def sweep(self) -> None:
        """Give the turns that nobody gave."""
        for tenant in self._store.tenants_with_lines():
            self.give(tenant)
