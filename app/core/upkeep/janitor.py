"""Repairs jobs that lost their worker or queue entry, or whose end nobody followed up.

One API process at a time has the duty. Two may: every step is a compare-and-set on the record, so one of
them wins.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from redis.exceptions import RedisError

from app.core.errors import Conflict, NibbleError, NotFound, WorkerLost
from app.core.jobs.job_queue import JobQueue, Place, entry_id
from app.core.jobs.job_store import JobStore
from app.core.jobs.outcome import Outcome
from app.core.records.job import Job, JobState, transition
from app.core.records.job_changes import failed, overdue, requeued, stale
from app.core.storage.object_store import ObjectStore
from app.core.storage.published import figures_of, published_before

log = logging.getLogger(__name__)

OnStep = Callable[[str], None]
STEPS = ("requeued", "failed", "cancelled", "succeeded", "enqueued", "settled")


class Wait(NamedTuple):
    """What the janitor remembers of a waiting job, so that it reads each record once."""

    entry: str  # of its next attempt
    until: float  # by time.monotonic(), if it may wait for a limited time


@dataclass
class Janitor:
    """One pass looks at every job that has not ended, and at ends that were not followed up.

    `on_step` is called with the name of each step.
    """

    store: JobStore
    queue: JobQueue
    objects: ObjectStore
    outcome: Outcome
    max_attempts: int = field(kw_only=True)
    on_step: OnStep = field(default=lambda step: None, kw_only=True)
    _moving: set[str] = field(default_factory=set, init=False)  # entries in no queue at the last pass
    _waits: dict[str, Wait] = field(default_factory=dict, init=False)  # of the jobs that wait, by id

    def sweep(self) -> None:
        """Do one pass. What is in order costs a few reads in bulk; only the rest is looked at by itself."""
        for state in (JobState.RUNNING, JobState.CANCELLING):
            for job in self._still(state, self.store.without_lease(self.store.in_state(state))):
                self._check_lease(job)
        self.queue.sweep()
        self._check_waiting()
        self._follow_up()

    def _follow_up(self) -> None:
        for job_id in self.store.unsettled():
            if self.outcome.follow_up(job_id):
                log.info("what follows from the end of job %s is done", job_id)
                self.on_step("settled")

    def _still(self, state: JobState, job_ids: list[str]) -> list[Job]:
        return [job for job in self.store.load_each(job_ids) if job.state is state]

    def _check_waiting(self) -> None:
        """Fail jobs that have waited too long, and queue again those that are neither in line nor queued."""
        waiting = self.store.in_state(JobState.QUEUED)
        self._waits = {job_id: self._waits[job_id] for job_id in waiting if job_id in self._waits}
        for job in self._still(JobState.QUEUED, [each for each in waiting if each not in self._waits]):
            self._waits[job.id] = self._wait_of(job)
        queued, in_line, now = self.queue.waiting(), self.store.in_lines(), time.monotonic()
        suspects = [
            job_id
            for job_id, wait in self._waits.items()
            if wait.until <= now or (wait.entry not in queued and job_id not in in_line)
        ]
        moving: set[str] = set()
        for job in self._still(JobState.QUEUED, suspects):
            self._waits[job.id] = self._wait_of(job)
            if not self._fail_overdue(job) and self._check_entry(job) is Place.MOVING:
                moving.add(entry_id(job))
        self._moving = moving

    def _wait_of(self, job: Job) -> Wait:
        limit_s = job.spec.queue_timeout_s
        if limit_s is None or job.attempt > 0:
            return Wait(entry_id(job), math.inf)
        return Wait(entry_id(job), time.monotonic() + limit_s - self.store.age_s(job.id))

    def _check_lease(self, seen: Job) -> None:
        if self.store.holds(seen.id, seen.attempt):
            return
        try:
            self._go_on_without_worker(seen)
        except (Conflict, NotFound) as fault:
            log.info("job %s changed while it was looked at: %s", seen.id, fault)
        except NibbleError as fault:
            log.warning(
                "job %s is left to the next pass, or to the collection of garbage: %s", seen.id, fault
            )

    def _go_on_without_worker(self, seen: Job) -> None:
        # A worker that died after its commit point has succeeded, although the record does not say so.
        published = published_before(self.objects, seen)
        job = self.store.update(seen.id, lambda job: self._without_worker(job, seen, published))
        step = "requeued" if job.state is JobState.QUEUED else str(job.state)
        message = f"worker {seen.worker} stopped renewing its lease in attempt {seen.attempt}; {step}"
        self._report(step, message, seen)
        self.store.append_event(
            seen.id, "note", {"code": WorkerLost.code, "message": message, "attempt": seen.attempt}
        )
        if job.state is JobState.QUEUED:
            self.queue.enqueue(job)
        else:
            self.outcome.follow_up(job.id)

    def _without_worker(self, job: Job, seen: Job, published: tuple[str, ...] | None) -> Job:
        """The job after the loss of its worker. Raises Conflict if it has changed since it was `seen`."""
        if job.attempt != seen.attempt or job.state is not seen.state:
            raise stale(job, seen.attempt)
        if published is not None:
            figures = figures_of(self.objects, published)
            done = job.progress.completed()
            return transition(job, JobState.SUCCEEDED, artifacts=published, figures=figures, progress=done)
        if job.state is JobState.CANCELLING:
            return transition(job, JobState.CANCELLED)
        if job.attempt < self.max_attempts:
            return requeued(job)
        return failed(
            job,
            WorkerLost(
                f"the worker {job.worker} was lost in attempt {job.attempt} of {self.max_attempts}",
                remedy="look for the end of the worker in its log (out of memory, a crash, a lost host), "
                "then retry the job",
            ),
        )

    def _fail_overdue(self, seen: Job) -> bool:
        """Fail a job that waited too long for its first start; returns whether it has ended."""
        limit_s = seen.spec.queue_timeout_s
        if limit_s is None or seen.attempt > 0 or self.store.age_s(seen.id) <= limit_s:
            return False
        try:
            job = self.store.update(seen.id, overdue)
        except (Conflict, NotFound) as fault:
            log.info("job %s changed while it was looked at: %s", seen.id, fault)
            return True
        if job.state is JobState.FAILED:
            self._report("failed", "it waited too long for a worker", seen)
            self.outcome.follow_up(job.id)
        return True

    def _check_entry(self, job: Job) -> Place:
        """Queue a waiting job again if its entry is gone; returns where the entry is."""
        if self.store.is_postponed(job.id) or self.store.is_in_line(job):
            return Place.WAITING
        entry_place = self.queue.locate(job)
        is_lost = entry_place is Place.GONE or (entry_place is Place.MOVING and entry_id(job) in self._moving)
        if is_lost:
            self.queue.remove(job)
            self.queue.enqueue(job)
            self._report("enqueued", "it was in no queue", job)
            return Place.WAITING
        return entry_place

    def _report(self, step: str, why: str, job: Job) -> None:
        log.warning("job %s %s: %s", job.id, step, why)
        self.on_step(step)


class Repeated(threading.Thread):
    """Does `work` every `interval_s` seconds until it is stopped."""

    def __init__(self, name: str, work: Callable[[], object], interval_s: float) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._interval_s = interval_s
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            try:
                self._work()
            except (RedisError, NibbleError) as fault:
                log.warning("%s could not finish its pass: %s", self.name, fault)
            except Exception:  # the task boundary: without this thread lost jobs stay lost
                log.exception("%s broke in its pass", self.name)

    def stop(self) -> None:
        self._stopped.set()
        self.join()
