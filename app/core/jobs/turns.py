"""Turns: the tenant's limit of running jobs decides which of its jobs are queued.

A job in line is in no queue, so it holds up no other tenant's. It gets its turn when one of the tenant's jobs
ends (outcome), or in a sweep once limits are raised. The
scripts that record and end jobs keep count of turns and lines (job_scripts).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from app.core.errors import NotFound, RecordUnreadable
from app.core.jobs.job_queue import JobQueue
from app.core.jobs.job_store import JobStore
from app.core.records.job import JobState

log = logging.getLogger(__name__)


class Turns:
    """Gives turns. `most(tenant)` is the number of jobs that the tenant may run; 0 is no limit."""

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

    def sweep(self) -> None:
        """Give the turns that nobody gave."""
        for tenant in self._store.tenants_with_lines():
            self.give(tenant)
