"""Turns: which of a tenant's jobs are in the queue.

No more of each priority than QUEUED_AT_ONCE, or one for 32 workers: the others wait in the tenant's line, and
the next one is queued when a worker takes one (attempt). So the queue has the tenants' jobs in turn, however
many one of them has sent, and the tenants share the workers. A limit of running jobs holds back more of them:
then the next one is queued when one of the tenant's jobs ends (outcome), or in a sweep.
The scripts that record, claim and end jobs keep count (job_scripts).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from app.core.errors import NotFound, RecordUnreadable
from app.core.jobs.job_queue import JobQueue
from app.core.jobs.job_store import JobStore
from app.core.records.job import JobState

log = logging.getLogger(__name__)

# At least. With one, a worker would wait for its predecessor's claim whenever a single tenant has jobs.
QUEUED_AT_ONCE = 2


class Turns:
    """Gives turns. `most(tenant)` is the number of jobs that the tenant may run; 0 is no limit."""

    def __init__(self, store: JobStore, queue: JobQueue, most: Callable[[str], int]) -> None:
        self._store = store
        self._queue = queue
        self._most = most

    def give(self, tenant: str) -> None:
        """Queue as many of the jobs in line as the tenant may have queued and running."""
        most = self._most(tenant)
        while (job_id := self._store.next_turn(tenant, most, QUEUED_AT_ONCE)) is not None:
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
            self._store.strike_claimed(tenant)
            self.give(tenant)
