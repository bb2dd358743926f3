"""The queue of job ids that workers wait on. The only module of app that knows RQ.

A queue entry is a hint that a record waits; the record in the job store is the truth. Work is named, never
imported, and arguments travel as JSON.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from redis import Redis
from rq import Queue
from rq.exceptions import DuplicateJobError, NoSuchJobError
from rq.job import Job as Entry
from rq.job import JobStatus
from rq.registry import StartedJobRegistry

from app.core.errors import QueueFull
from app.core.records.job import Job

RUN_JOB_TASK = "workers.tasks.run_job"
# In the order in which a worker looks at them.
QUEUE_NAMES = ("nibble-high", "nibble-normal", "nibble-low")
SERIALIZER = "json"
RESULT_TTL_S = 0  # an entry that was executed says nothing that the record does not
FAILURE_TTL_S = 7 * 24 * 3600
# The supervisor keeps `timeout_s` itself; the queue's own limit is a backstop behind it.
TIMEOUT_MARGIN_S = 600


class Place(StrEnum):
    """The whereabouts of the queue entry of a job's next attempt."""

    WAITING = "waiting"  # in its queue
    TAKEN = "taken"  # a worker executes the entry
    MOVING = "moving"  # in no queue, not begun: just taken, or lost with its worker
    GONE = "gone"  # there is no entry that could still run


def queue_name(job: Job) -> str:
    return f"nibble-{job.spec.priority}"


def entry_id(job: Job) -> str:
    """The queue entry of the job's next attempt: each attempt has exactly one."""
    return f"{job.id}-{job.attempt + 1}"


class JobQueue:
    """Queues jobs for the workers as calls of `run_job(job_id, attempt)`."""

    def __init__(self, redis: Redis, *, limit: int) -> None:
        self._redis = redis
        self._limit = limit

    def enqueue(self, job: Job, *, first: bool = False) -> bool:
        """Queue the job's next attempt; False if its entry exists already.

        A further attempt goes to the front, as with `first`: it has waited its turn before.
        """
        try:
            self._queue(queue_name(job)).enqueue_call(
                RUN_JOB_TASK,
                args=(job.id, job.attempt + 1),
                timeout=job.spec.timeout_s + TIMEOUT_MARGIN_S,
                result_ttl=RESULT_TTL_S,
                failure_ttl=FAILURE_TTL_S,
                description=f"{job.id} attempt {job.attempt + 1}",
                job_id=entry_id(job),
                at_front=first or job.attempt > 0,
                unique=True,
            )
        except DuplicateJobError:
            return False
        return True

    def remove(self, job: Job) -> None:
        """Remove the entry of a job's next attempt, if there is one."""
        entry = self._entry(job)
        if entry is not None:
            entry.delete()

    def locate(self, job: Job) -> Place:
        entry = self._entry(job)
        if entry is None:
            return Place.GONE
        status = entry.get_status(refresh=False)
        if status is JobStatus.STARTED:
            return Place.TAKEN
        if status is not JobStatus.QUEUED:
            return Place.GONE
        waiting = self._queue(queue_name(job)).get_job_position(entry) is not None
        return Place.WAITING if waiting else Place.MOVING

    def waiting(self) -> set[str]:
        """The ids of all entries in the queues."""
        pipe: Any = self._redis.pipeline(transaction=False)
        for name in QUEUE_NAMES:
            pipe.lrange(self._queue(name).key, 0, -1)
        return {entry.decode() for entries in pipe.execute() for entry in entries}

    def depths(self) -> dict[str, int]:
        """The number of entries that wait in each queue."""
        return {name: self._queue(name).count for name in QUEUE_NAMES}

    def require_room(self, waiting: int) -> None:
        """Raise QueueFull if `waiting` jobs are as many as the queue may hold."""
        if waiting >= self._limit:
            raise QueueFull(
                f"{waiting} jobs wait already; the limit is {self._limit}",
                remedy="try again later, or let the operator raise NIBBLE_QUEUE_LIMIT or start workers",
            )

    def sweep(self) -> None:
        """Mark entries as failed if their worker died before it claimed the job."""
        for name in QUEUE_NAMES:
            StartedJobRegistry(name, connection=self._redis, serializer=SERIALIZER).cleanup()

    def _queue(self, name: str) -> Any:
        return Queue(name, connection=self._redis, serializer=SERIALIZER)

    def _entry(self, job: Job) -> Entry | None:
        try:
            return Entry.fetch(entry_id(job), connection=self._redis, serializer=SERIALIZER)
        except NoSuchJobError:
            return None
