"""Every way in which a job ends, and all that has to follow from it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest

from app.core.access.api_keys import KeyStore, Scope
from app.core.access.limits import TenantLimits
from app.core.changes.redis_keys import ENDED, events_key, lease_key
from app.core.jobs.job_queue import Place
from app.core.jobs.outcome import Outcome
from app.core.outgoing.webhook_messages import DeliveryStore
from app.core.records.ids import artifact_id
from app.core.records.job import Job, JobState, transition
from app.core.records.job_changes import cancel_requested
from app.core.settings import Settings
from app.core.storage.reuse import ReuseIndex
from app.core.storage.storage_keys import FOLDERS, checkpoint_prefix, report_key
from app.core.storage.tags import Tags
from app.core.upkeep.garbage import GarbageCollector
from tests.integration.api_service import ADMIN_KEY, EXAMPLES, Service, running_service
from tests.integration.workshop import Workshop
from tests.waiting import wait_until
from workers.attempts.attempt_record import AttemptRecord
from workers.attempts.ending import Ending
from workers.attempts.watch import StopReason, Watch

FORMATS = ["awq", "compressed-tensors"]
WEBHOOK = {"url": "http://127.0.0.1:9/", "events": ["job.succeeded", "job.failed", "job.cancelled"]}


class Died(BaseException):
    """A process ends here: nothing of it runs on."""


class Floor:
    """A running API and a worker's surroundings over the same stores. A tenant runs one job at a time."""

    def __init__(self, service: Service, workshop: Workshop) -> None:
        self.service, self.workshop = service, workshop
        self.store, self.objects, self.redis = service.store, service.objects, service.redis
        self.next: Job | None = None  # in line
        self.with_traces: set[str] = set()

    def submit(self, **body: Any) -> str:
        """A job that asks for everything that may follow; its id. Behind the first one, another waits."""
        wishes = {"formats": FORMATS, "deploy": {"name": "served"}, "webhook": WEBHOOK, "timeout_s": 60}
        job_id = str(self.service.submit(**{**wishes, **body})["id"])
        if self.next is None:
            self.next = self.store.load(self.service.submit(force=True)["id"])
            assert self.store.is_in_line(self.next)
        return job_id

    def leave_traces(self, job_id: str) -> None:
        """What an attempt leaves that dies between the manifests of two formats."""
        self.objects.put(f"{checkpoint_prefix(job_id)}/k/layer-0", b"1")
        self.service.publish(job_id, {"config.json": b"{}"})
        self.with_traces.add(job_id)

    def lose_worker(self, job_id: str, attempt: int = 1) -> None:
        """A worker takes the job and is never heard of again."""
        self.service.queue.remove(self.store.load(job_id))
        self.store.claim(job_id, attempt, worker="w", lease_s=30)
        self.redis.delete(lease_key(job_id))
        self.workshop.sweep()

    def run(self, job_id: str, attempt: int = 1) -> None:
        job = self.store.load(job_id)
        self.service.queue.remove(job)
        self.workshop.run(job, attempt)

    def cancel(self, job_id: str) -> None:
        self.service.client.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()

    def ending(self, job_id: str) -> Ending:
        """Of the attempt that has claimed the job."""
        job, context = self.store.load(job_id), self.workshop.context()
        watch = Watch(context.store, job, lease_s=30, shutdown=threading.Event())
        return Ending(context, AttemptRecord(context.store, job, watch))


@pytest.fixture
def floor(redis_url: str, tmp_path: Path) -> Iterator[Floor]:
    settings = Settings(
        state_dir=tmp_path / "state",
        redis_url=redis_url,
        model_roots=(EXAMPLES, tmp_path),
        bootstrap_api_key=ADMIN_KEY,
        janitor_interval_s=300,
        outgoing_networks="127.0.0.1/32",
        tenant_running_jobs=1,
    )
    with running_service(settings) as service:
        yield Floor(service, Workshop(service.redis, redis_url, tmp_path / "state", tenant_running_jobs=1))


def succeeded(floor: Floor, _: pytest.MonkeyPatch) -> str:
    job_id = floor.submit()
    floor.run(job_id)
    return job_id


def worker_died_after_its_last_manifest(floor: Floor, patch: pytest.MonkeyPatch) -> str:
    job_id = floor.submit()
    die_before_the_record(floor, job_id, patch)
    floor.workshop.sweep()
    return job_id


def worker_died_so_and_cancel_was_asked(floor: Floor, patch: pytest.MonkeyPatch) -> str:
    job_id = floor.submit()
    die_before_the_record(floor, job_id, patch)
    floor.cancel(job_id)
    floor.workshop.sweep()
    return job_id


def die_before_the_record(floor: Floor, job_id: str, patch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise Died

    patch.setattr(Ending, "succeed", die)
    with pytest.raises(Died):
        floor.run(job_id)
    assert floor.store.load(job_id).state is JobState.RUNNING


def reused_at_submission(floor: Floor, _: pytest.MonkeyPatch) -> str:
    floor.run(floor.submit(deploy=None))
    return floor.submit()


def reused_by_the_worker(floor: Floor, _: pytest.MonkeyPatch) -> str:
    """Submission can't tell that the contents are the same."""
    first = floor.submit(deploy=None)
    floor.run(first)
    floor.redis.delete(f"nibble:made:default:{floor.store.load(first).fingerprint}")
    job_id = floor.submit()
    floor.run(job_id)
    return job_id


def cancelled_while_queued(floor: Floor, _: pytest.MonkeyPatch) -> str:
    job_id = floor.submit()
    floor.cancel(job_id)
    return job_id


def cancelled_after_it_was_requeued_between_two_formats(floor: Floor, _: pytest.MonkeyPatch) -> str:
    job_id = floor.submit()
    floor.leave_traces(job_id)
    floor.lose_worker(job_id)
    assert floor.store.load(job_id).state is JobState.QUEUED
    floor.cancel(job_id)
    return job_id


def cancelled_while_running(floor: Floor, _: pytest.MonkeyPatch) -> str:
    job_id = floor.submit(labels={"fault": "hang"})
    floor.leave_traces(job_id)

    def cancel() -> None:
        wait_until(lambda: "checkpoint" in [event.kind for event in floor.store.events(job_id)])
        floor.cancel(job_id)

    thread = threading.Thread(target=cancel)
    thread.start()
    floor.run(job_id)
    thread.join()
    return job_id


def cancelled_as_its_worker_was_lost(floor: Floor, _: pytest.MonkeyPatch) -> str:
    job_id = floor.submit()
    floor.leave_traces(job_id)
    floor.service.claim(job_id)
    floor.cancel(job_id)
    floor.redis.delete(lease_key(job_id))
    floor.workshop.sweep()
    return job_id


def cancelled_as_its_worker_gave_it_back(floor: Floor, _: pytest.MonkeyPatch) -> str:
    job_id = floor.submit()
    floor.leave_traces(job_id)
    floor.service.claim(job_id)
    floor.cancel(job_id)
    floor.ending(job_id).stop(StopReason.SHUTDOWN)
    return job_id


def child_failed(floor: Floor, _: pytest.MonkeyPatch) -> str:
    return ran_into(floor, "exit")


def target_was_missed(floor: Floor, _: pytest.MonkeyPatch) -> str:
    return ran_into(floor, "report")


def timed_out(floor: Floor, _: pytest.MonkeyPatch) -> str:
    return ran_into(floor, "hang", timeout_s=2)


def ran_into(floor: Floor, fault: str, **body: object) -> str:
    job_id = floor.submit(labels={"fault": fault}, **body)
    floor.leave_traces(job_id)
    floor.run(job_id)
    return job_id


def killed_in_every_attempt(floor: Floor, _: pytest.MonkeyPatch) -> str:
    job_id = floor.submit(labels={"fault": "kill"})
    floor.leave_traces(job_id)
    for attempt in (1, 2, 3):
        floor.run(job_id, attempt)
    return job_id


def lost_in_every_attempt(floor: Floor, _: pytest.MonkeyPatch) -> str:
    job_id = floor.submit()
    floor.leave_traces(job_id)
    for attempt in (1, 2, 3):
        floor.lose_worker(job_id, attempt)
    return job_id


def waited_too_long(floor: Floor, _: pytest.MonkeyPatch) -> str:
    job_id = floor.submit(queue_timeout_s=60)
    ((entry, recorded),) = floor.redis.xrange(events_key(job_id))
    floor.redis.delete(events_key(job_id))
    floor.redis.xadd(events_key(job_id), recorded, id=f"{int(entry.partition(b'-')[0]) - 61_000}-0")
    floor.workshop.sweep()
    return job_id


Way = Callable[[Floor, pytest.MonkeyPatch], str]
WAYS: dict[JobState, tuple[Way, ...]] = {
    JobState.SUCCEEDED: (
        succeeded,
        worker_died_after_its_last_manifest,
        worker_died_so_and_cancel_was_asked,
        reused_at_submission,
        reused_by_the_worker,
    ),
    JobState.CANCELLED: (
        cancelled_while_queued,
        cancelled_after_it_was_requeued_between_two_formats,
        cancelled_while_running,
        cancelled_as_its_worker_was_lost,
        cancelled_as_its_worker_gave_it_back,
    ),
    JobState.FAILED: (
        child_failed,
        target_was_missed,
        timed_out,
        killed_in_every_attempt,
        lost_in_every_attempt,
        waited_too_long,
    ),
}
TABLE = [pytest.param(way, state, id=way.__name__) for state, ways in WAYS.items() for way in ways]


@dataclass(frozen=True)
class Facts:
    """All that is to be seen of a job that has ended."""

    state: JobState
    artifacts: list[str]  # those that the API lists, of all jobs
    deployments: list[tuple[str, str, str | None]]
    reused: list[tuple[str, tuple[str, ...]] | None]  # by each of its fingerprints
    stored_bytes: int
    checkpoints: list[str]
    entry: Place
    messages: list[str]
    events: list[tuple[str, str, dict[str, Any]]]
    unsettled: list[str]
    objects: list[str]


def facts_of(floor: Floor, job_id: str) -> Facts:
    job, client = floor.store.load(job_id), floor.service.client
    reuse = ReuseIndex(floor.redis, floor.objects)
    found = [reuse.find("default", known) for known in (job.fingerprint, job.contents) if known is not None]
    deployed = client.get("/v1/deployments").json()["data"]
    return Facts(
        state=job.state,
        artifacts=sorted(each["id"] for each in client.get("/v1/artifacts").json()["data"]),
        deployments=[(each["name"], each["artifact"], each["job"]) for each in deployed],
        reused=[(made.job, made.artifacts) if made is not None else None for made in found],
        stored_bytes=TenantLimits(floor.redis, floor.service.settings).stored_bytes("default"),
        checkpoints=[head.key for head in floor.objects.list(checkpoint_prefix(job_id))],
        entry=floor.service.queue.locate(job),
        messages=[delivery.type for delivery in DeliveryStore(floor.redis).list(job_id)],
        events=[(event.id, event.kind, event.payload) for event in floor.store.events(job_id, limit=1000)],
        unsettled=floor.store.unsettled(),
        objects=[head.key for folder in FOLDERS for head in floor.objects.list(folder)],
    )


def check(floor: Floor, job_id: str, state: JobState) -> None:
    """What must be so after an end in this state, however it came."""
    facts, job = facts_of(floor, job_id), floor.store.load(job_id)
    assert floor.next is not None
    assert floor.service.queue.locate(floor.next) is Place.WAITING
    assert not floor.store.is_in_line(floor.next)
    assert (facts.state, facts.unsettled, facts.entry) == (state, [], Place.GONE)
    assert facts.messages == [f"job.{state}"]
    kinds = [(kind, payload.get("state")) for _, kind, payload in facts.events]
    assert kinds.count(("state", str(state))) == 1
    assert TenantLimits(floor.redis, floor.service.settings).active_jobs("default") == 1  # the next one
    if state is JobState.SUCCEEDED:
        assert len(job.artifacts) == len(FORMATS)
        assert facts.artifacts == sorted(job.artifacts)
        assert facts.deployments == [("served", job.artifacts[0], job_id)]
        assert facts.reused
        assert set(facts.reused) == {(job.reused_from or job_id, job.artifacts)}
        manifests = [floor.service.client.get(f"/v1/artifacts/{each}").json() for each in job.artifacts]
        assert facts.stored_bytes == sum(each["size"] for each in manifests) > 0
        assert facts.checkpoints == []
        assert kinds.count(("deployed", None)) == 1
    else:
        assert (facts.artifacts, facts.deployments, facts.stored_bytes) == ([], [], 0)
        assert [key for key in facts.objects if key.endswith("manifest.json")] == []
        assert set(facts.reused) == {None}
        assert ("deployed", None) not in kinds
        # A retry goes on from those of a failed job.
        assert bool(facts.checkpoints) is (state is JobState.FAILED and job_id in floor.with_traces)


@pytest.mark.parametrize(("way", "state"), TABLE)
def test_all_follows_from_each_end_and_doing_it_again_changes_nothing(
    floor: Floor, monkeypatch: pytest.MonkeyPatch, way: Way, state: JobState
) -> None:
    job_id = way(floor, monkeypatch)
    check(floor, job_id, state)
    assert state is JobState.SUCCEEDED or floor.objects.list("artifacts") == []
    before = facts_of(floor, job_id)
    floor.redis.sadd(ENDED, job_id)
    assert floor.service.outcome.follow_up(job_id)
    assert facts_of(floor, job_id) == before


# What the report of each end without a result states: attempts, stage, finished layers, stages that took
# time, words of its notes or output.
UNFINISHED: dict[Way, tuple[int, str | None, int | None, set[str], str]] = {
    cancelled_while_queued: (0, None, None, set(), ""),
    cancelled_after_it_was_requeued_between_two_formats: (1, None, None, set(), "stopped renewing its lease"),
    cancelled_while_running: (1, "calibrating", 2, {"fetching", "calibrating"}, ""),
    cancelled_as_its_worker_was_lost: (1, None, None, set(), "stopped renewing its lease"),
    cancelled_as_its_worker_gave_it_back: (1, None, None, set(), ""),
    child_failed: (1, "calibrating", 2, {"fetching", "calibrating"}, "the last words"),
    timed_out: (1, "calibrating", 2, {"fetching", "calibrating"}, ""),
    killed_in_every_attempt: (3, "calibrating", 2, {"fetching", "calibrating"}, "attempt 2 failed"),
    lost_in_every_attempt: (3, None, None, set(), "stopped renewing its lease in attempt 2; requeued"),
    waited_too_long: (0, None, None, set(), ""),
}


@pytest.mark.parametrize(("way", "state"), TABLE)
def test_every_end_has_a_report(
    floor: Floor, monkeypatch: pytest.MonkeyPatch, way: Way, state: JobState
) -> None:
    job_id = way(floor, monkeypatch)
    client, job = floor.service.client, floor.store.load(job_id)
    answer = client.get(client.get(f"/v1/jobs/{job_id}").json()["links"]["report"])
    report = answer.json()
    assert answer.status_code == 200
    if state is JobState.SUCCEEDED or way is target_was_missed:
        assert report == json.loads(floor.objects.get(report_key(job_id)))
        return
    attempts, stage, layers, stages, words = UNFINISHED[way]
    assert (report["complete"], report["job"], report["state"]) == (False, job_id, state)
    assert (report["attempts"], report["stage"]) == (attempts, stage)
    assert report["error"] == (None if job.error is None else job.error.model_dump())
    assert (report["finished_layers"] or 0) <= (layers or 0)  # progress is recorded twice a second
    assert report["checkpoints"] == (layers or 0)
    assert set(report["stages"]) == stages
    assert sum(report["stages"].values()) + report["waited_s"] > 0
    assert words in "\n".join([*report["notes"], report["output"] or ""])


def test_a_job_that_has_not_ended_has_no_report_yet(floor: Floor) -> None:
    job_id = floor.submit()
    job = floor.service.client.get(f"/v1/jobs/{job_id}").json()
    answer = floor.service.client.get(f"/v1/jobs/{job_id}/report")
    assert "report" not in job["links"]
    assert (answer.status_code, answer.json()["remedy"]) == (404, "wait until the job has ended")


class Mortal:
    """A part of the service whose process dies before it is asked once more than `left` times."""

    def __init__(self, part: object, left: list[int]) -> None:
        self._part, self._left = part, left

    def __getattr__(self, name: str) -> Callable[..., object]:
        ask = getattr(self._part, name)

        def answer(*arguments: object, **options: object) -> object:
            if self._left[0] == 0:
                raise Died
            self._left[0] -= 1
            return ask(*arguments, **options)

        return answer


def mortal(outcome: Outcome, steps: int) -> Outcome:
    """One whose process dies after so many steps."""
    left = [steps]
    return replace(
        outcome, **{each.name: Mortal(getattr(outcome, each.name), left) for each in fields(outcome)}
    )


def ended_without_more(floor: Floor, state: JobState) -> str:
    """A job whose end is recorded, by a process that dies before it does what follows."""
    job_id = floor.submit()
    floor.leave_traces(job_id)
    floor.service.claim(job_id)
    changes: dict[str, object] = {}
    if state is JobState.SUCCEEDED:
        published = floor.service.publish(job_id, {"config.json": b"{}"}, format_name="compressed-tensors")
        changes = {"artifacts": (artifact_id(job_id, 0, "awq"), published.id)}
    if state is JobState.CANCELLED:
        floor.store.update(job_id, cancel_requested)
    floor.store.update(job_id, lambda job: transition(job, state, **changes), attempt=1)
    assert floor.store.unsettled() == [job_id]
    return job_id


@pytest.mark.parametrize("state", list(WAYS))
def test_what_follows_is_completed_wherever_the_process_died(floor: Floor, state: JobState) -> None:
    service, steps, has_died = floor.service, 0, True
    limits = TenantLimits(floor.redis, service.settings)
    collector = GarbageCollector(floor.store, floor.objects, limits, Tags(floor.redis), service.settings)
    while has_died:
        floor.redis.flushdb()
        for folder in FOLDERS:
            floor.objects.delete_prefix(folder)
        KeyStore(floor.redis).register(ADMIN_KEY, tenant="default", scopes=frozenset({Scope.ADMIN}))
        floor.next = None
        job_id = ended_without_more(floor, state)
        try:
            mortal(service.outcome, steps).settle(job_id)
            has_died = False
        except Died:
            assert not floor.store.is_settled(job_id)
            floor.workshop.sweep()
        check(floor, job_id, state)
        # Files whose manifest was removed in the step before are to be seen by nobody; they wait for this.
        collector.collect()
        assert state is JobState.SUCCEEDED or floor.objects.list("artifacts") == []
        steps += 1
    assert steps > 5


def test_an_absent_storage_holds_up_neither_the_end_nor_the_next_job(floor: Floor) -> None:
    """What needs storage is done once it is back; until then the job can't be deleted."""
    job_id = floor.submit()
    floor.leave_traces(job_id)
    stored, aside = floor.service.settings.state_dir / "storage", floor.service.settings.state_dir / "aside"
    stored.rename(aside)
    stored.write_text("no folder")
    floor.cancel(job_id)
    assert floor.next is not None
    assert floor.service.queue.locate(floor.next) is Place.WAITING
    assert floor.store.unsettled() == [job_id]
    assert floor.service.client.delete(f"/v1/jobs/{job_id}").status_code == 503
    stored.unlink()
    aside.rename(stored)
    assert floor.service.client.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert floor.service.client.get("/v1/artifacts").json()["data"] == []
    assert (floor.store.unsettled(), floor.objects.list("checkpoints")) == ([], [])


def test_a_deleted_deployment_is_not_made_again(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a janitor that completes what a process left undone after it had deployed."""
    job_id = succeeded(floor, monkeypatch)
    (deployment,) = floor.service.client.get("/v1/deployments").json()["data"]
    floor.service.client.delete(f"/v1/deployments/{deployment['id']}").raise_for_status()
    wait_until(lambda: floor.service.client.get("/v1/deployments").json()["data"] == [])
    floor.redis.sadd(ENDED, job_id)
    floor.workshop.sweep()
    assert floor.service.client.get("/v1/deployments").json()["data"] == []
    assert floor.store.unsettled() == []
