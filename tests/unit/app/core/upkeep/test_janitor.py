from __future__ import annotations

import threading
from datetime import UTC, datetime

import pytest
from redis import Redis

from app.core.deployments.deployment_store import DeploymentStore
from app.core.jobs.job_queue import JobQueue, Place
from app.core.jobs.job_store import JobStore
from app.core.records.ids import artifact_id, new_id
from app.core.records.job import Job, JobState, transition
from app.core.records.job_changes import cancel_requested
from app.core.records.specs import JobSpec
from app.core.settings import Settings
from app.core.storage.object_store import ObjectStore
from app.core.storage.storage_keys import manifest_key, report_key
from app.core.upkeep.janitor import Janitor, Repeated
from tests.outcomes import outcome_over


class House:
    """Stores, a queue, and a janitor whose steps are noted."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.store = JobStore(redis)
        self.queue = JobQueue(redis, limit=100)
        self.objects = ObjectStore("memory:///")
        self.deployments = DeploymentStore(redis)
        self.steps: list[str] = []
        self.janitor = self.new_janitor()

    def new_janitor(self) -> Janitor:
        outcome = outcome_over(self.redis, self.objects, Settings())
        parts = (self.store, self.queue, self.objects, outcome)
        return Janitor(*parts, max_attempts=2, on_step=self.steps.append)

    def submit(self, **fields: object) -> Job:
        spec = JobSpec.model_validate({"model": "org/name", **fields})
        job = Job(id=new_id("job"), tenant="t", spec=spec, created_at=datetime.now(UTC))
        self.store.create(job)
        self.queue.enqueue(job)
        return job

    def lose_worker(self, job: Job, attempt: int) -> None:
        """A worker takes the entry, claims the job and is never heard of again."""
        self.queue.remove(self.store.load(job.id))
        self.store.claim(job.id, attempt, worker="w", lease_s=30)
        self.redis.delete(f"nibble:lease:{job.id}")


@pytest.fixture
def house(redis: Redis) -> House:
    return House(redis)


def test_what_is_in_order_is_left_alone(house: House) -> None:
    waiting, running = house.submit(), house.submit()
    house.store.claim(running.id, 1, worker="w", lease_s=30)
    house.janitor.sweep()
    assert house.steps == []
    assert house.store.version(waiting.id) == 1


def test_a_lost_job_is_queued_again(house: House) -> None:
    job = house.submit()
    house.lose_worker(job, 1)
    house.janitor.sweep()
    found = house.store.load(job.id)
    assert (found.state, found.attempt) == (JobState.QUEUED, 1)
    assert house.queue.locate(found) is Place.WAITING
    assert house.steps == ["requeued"]
    assert house.store.events(job.id)[-1].payload["code"] == "worker_lost"


def test_a_record_of_a_newer_version_holds_up_no_other(house: House) -> None:
    newer, lost = house.submit(), house.submit()
    house.lose_worker(lost, 1)
    house.redis.hset(f"nibble:job:{newer.id}", "spec", '{"model": "org/name", "pruning": 0.5}')
    house.janitor.sweep()
    assert house.steps == ["requeued"]
    assert house.store.load(lost.id).state is JobState.QUEUED


def test_a_job_lost_too_often_fails(house: House) -> None:
    job = house.submit()
    for attempt in (1, 2):
        house.lose_worker(job, attempt)
        house.janitor.sweep()
    found = house.store.load(job.id)
    assert found.state is JobState.FAILED
    assert found.error is not None
    assert found.error.code == "worker_lost"
    assert found.error.remedy
    assert house.steps == ["requeued", "failed"]


def test_a_cancelled_job_without_worker_is_cancelled(house: House) -> None:
    job = house.submit()
    house.lose_worker(job, 1)
    house.store.update(job.id, cancel_requested)
    house.janitor.sweep()
    assert house.store.load(job.id).state is JobState.CANCELLED


def test_an_entry_that_vanished_is_made_again(house: House) -> None:
    job = house.submit()
    house.queue.remove(job)
    house.janitor.sweep()
    assert house.queue.locate(job) is Place.WAITING
    assert house.steps == ["enqueued"]


def test_an_entry_on_its_way_is_given_one_interval(house: House) -> None:
    job = house.submit()
    house.redis.delete("rq:queue:nibble-normal")
    house.janitor.sweep()
    assert house.steps == []
    house.janitor.sweep()
    assert house.queue.locate(job) is Place.WAITING


def test_two_janitors_take_each_step_once(house: House) -> None:
    jobs = [house.submit() for _ in range(5)]
    for job in jobs:
        house.lose_worker(job, 1)
    house.janitor.sweep()
    house.new_janitor().sweep()
    assert house.steps == ["requeued"] * 5
    assert house.queue.depths()["nibble-normal"] == 5


def test_of_two_janitors_at_once_one_tells_of_the_step(house: House) -> None:
    job = house.submit()
    house.lose_worker(job, 1)
    seen = house.store.load(job.id)
    house.janitor.sweep()
    house.new_janitor()._check_lease(seen)
    assert house.steps == ["requeued"]
    assert [event.kind for event in house.store.events(job.id)].count("note") == 1


def test_a_published_job_without_worker_succeeds_and_is_deployed(house: House) -> None:
    job = house.submit(deploy={"name": "chat"}, formats=["awq"])
    house.lose_worker(job, 1)
    art_id = artifact_id(job.id, 0, "awq")
    house.objects.put(report_key(job.id), b"{}")
    house.objects.put(manifest_key(art_id), b"{}")
    house.janitor.sweep()
    found = house.store.load(job.id)
    assert (found.state, found.artifacts, house.steps) == (JobState.SUCCEEDED, (art_id,), ["succeeded"])
    (live,) = house.deployments.all()
    assert (live.deployment.job, live.spec.artifact, live.spec.name) == (job.id, art_id, "chat")
    assert [event.kind for event in house.store.events(job.id)][-2:] == ["note", "deployed"]


def test_ends_that_nobody_followed_up_are_settled(house: House) -> None:
    """One that only a newer version can read is left to that, and holds up no other."""
    newer, cancelled = house.submit(), house.submit()
    for job in (newer, cancelled):
        house.store.update(job.id, cancel_requested)
    spec = house.redis.hget(f"nibble:job:{newer.id}", "spec")
    house.redis.hset(f"nibble:job:{newer.id}", "spec", '{"model": "org/name", "pruning": 0.5}')
    house.janitor.sweep()
    assert (house.steps, house.store.unsettled()) == (["settled"], [newer.id])
    assert house.queue.locate(cancelled) is Place.GONE
    house.redis.hset(f"nibble:job:{newer.id}", "spec", spec or b"")
    house.janitor.sweep()
    assert (house.steps, house.store.unsettled()) == (["settled"] * 2, [])


def test_a_job_that_ended_meanwhile_keeps_its_end(house: House) -> None:
    job = house.submit()
    house.lose_worker(job, 1)
    seen = house.store.load(job.id)
    house.store.update(job.id, lambda job: transition(job, JobState.SUCCEEDED), attempt=1)
    house.janitor._check_lease(seen)
    assert house.store.load(job.id).state is JobState.SUCCEEDED
    assert house.steps == []


@pytest.mark.parametrize("report", [b"", b"[]", b'{"published": "all"}'])
def test_a_damaged_report_holds_up_no_job(house: House, report: bytes) -> None:
    damaged, other = house.submit(), house.submit()
    for job in (damaged, other):
        house.lose_worker(job, 1)
    house.objects.put(report_key(damaged.id), report)
    house.janitor.sweep()
    assert house.steps == ["requeued"] * 2


def test_a_pass_that_breaks_is_not_the_last_one(caplog: pytest.LogCaptureFixture) -> None:
    passes = threading.Semaphore(0)

    def work() -> None:
        passes.release()
        raise ValueError("broken on purpose")

    janitor = Repeated("janitor", work, 0.01)
    janitor.start()
    assert passes.acquire(timeout=30)
    assert passes.acquire(timeout=30)
    janitor.stop()
    assert "broken on purpose" in caplog.text
