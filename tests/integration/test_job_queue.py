from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from redis import Redis
from rq import Queue
from rq.job import Job as Entry
from rq.job import JobStatus

from app.core.errors import QueueFull
from app.core.jobs.job_queue import RUN_JOB_TASK, JobQueue, Place, entry_id
from app.core.records.ids import new_id
from app.core.records.job import Job
from app.core.records.specs import JobSpec


@pytest.fixture
def queue(redis: Redis) -> JobQueue:
    return JobQueue(redis, limit=3)


def waiting_job(priority: str = "normal", attempt: int = 0) -> Job:
    spec = JobSpec.model_validate({"model": "org/name", "priority": priority, "timeout_s": 60})
    return Job(id=new_id("job"), tenant="t", spec=spec, attempt=attempt, created_at=datetime.now(UTC))


def test_an_entry_names_the_task_and_carries_json(queue: JobQueue, redis: Redis) -> None:
    job = waiting_job("high", attempt=1)
    assert queue.enqueue(job)
    entry = Entry.fetch(entry_id(job), connection=redis, serializer="json")
    assert entry.func_name == RUN_JOB_TASK
    assert entry.args == [job.id, 2]
    assert entry.origin == "nibble-high"
    assert json.loads(entry.data)[0] == RUN_JOB_TASK


def test_an_attempt_is_queued_once(queue: JobQueue) -> None:
    job = waiting_job()
    assert queue.enqueue(job)
    assert not queue.enqueue(job)
    assert queue.depths() == {"nibble-high": 0, "nibble-normal": 1, "nibble-low": 0}


def test_a_further_attempt_goes_to_the_front(queue: JobQueue, redis: Redis) -> None:
    first, again = waiting_job(), waiting_job(attempt=1)
    queue.enqueue(first)
    queue.enqueue(again)
    assert Queue("nibble-normal", connection=redis).job_ids == [entry_id(again), entry_id(first)]


def test_a_removed_entry_is_gone(queue: JobQueue) -> None:
    job = waiting_job()
    queue.remove(job)
    queue.enqueue(job)
    assert queue.locate(job) is Place.WAITING
    queue.remove(job)
    assert queue.locate(job) is Place.GONE


def test_places_of_an_entry_in_a_workers_hands(queue: JobQueue, redis: Redis) -> None:
    job = waiting_job()
    queue.enqueue(job)
    redis.delete("rq:queue:nibble-normal")
    assert queue.locate(job) is Place.MOVING
    entry = Entry.fetch(entry_id(job), connection=redis, serializer="json")
    entry.set_status(JobStatus.STARTED)
    assert queue.locate(job) is Place.TAKEN
    entry.set_status(JobStatus.FAILED)
    assert queue.locate(job) is Place.GONE


def test_a_full_queue_takes_no_more(queue: JobQueue) -> None:
    for priority in ("low", "normal", "high"):
        queue.require_room(sum(queue.depths().values()))
        queue.enqueue(waiting_job(priority))
    with pytest.raises(QueueFull, match="3 jobs wait"):
        queue.require_room(sum(queue.depths().values()))
