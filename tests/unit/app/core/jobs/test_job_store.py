from __future__ import annotations

import json
import threading
from datetime import UTC, datetime

import pytest
from redis import Redis

from app.core.changes.redis_keys import JOB_CHANGES
from app.core.errors import Conflict, MalformedRequest, NotFound, RecordUnreadable
from app.core.jobs.job_store import JobFilter, JobStore
from app.core.records.ids import new_id
from app.core.records.job import Job, JobState, Progress, Stage, transition
from app.core.records.specs import JobSpec


@pytest.fixture
def store(redis: Redis) -> JobStore:
    return JobStore(redis)


def new_job(tenant: str = "t", **labels: str) -> Job:
    spec = JobSpec(model="org/name", labels=labels)
    return Job(id=new_id("job"), tenant=tenant, spec=spec, created_at=datetime.now(UTC))


def stored(store: JobStore, **labels: str) -> Job:
    job = new_job(**labels)
    assert store.create(job)
    return job


def running(store: JobStore) -> Job:
    return store.claim(stored(store).id, 1, worker="w", lease_s=30)


def test_a_job_is_read_as_it_was_created(store: JobStore) -> None:
    job = stored(store, team="search")
    assert store.read(job.id) == (job, 1)
    assert [(event.kind, event.payload["state"]) for event in store.events(job.id)] == [("state", "queued")]


FIRST_VERSION = """{"id": "ID", "tenant": "t", "state": "queued", "stage": null,
    "progress": {"fraction": 0.0, "layer": null, "layers": null, "eta_s": null}, "attempt": 0, "worker": null,
    "created_at": "2026-11-20T10:00:00Z", "started_at": null, "finished_at": null, "error": null,
    "artifacts": [], "retry_of": null}"""


def rewritten(store: JobStore, redis: Redis, *, record: str | None = None, spec: str | None = None) -> Job:
    """A job as another version has recorded it."""
    job = stored(store)
    if record is not None:
        redis.hset(f"nibble:job:{job.id}", "record", record.replace("ID", job.id))
    if spec is not None:
        redis.hset(f"nibble:job:{job.id}", "spec", spec)
    return job


def test_a_record_of_the_first_version_goes_on(store: JobStore, redis: Redis) -> None:
    job = rewritten(store, redis, record=FIRST_VERSION, spec='{"model": "org/name"}')
    assert store.claim(job.id, 1, worker="w", lease_s=30).state is JobState.RUNNING
    assert store.load(job.id).spec == JobSpec(model="org/name")


def test_what_a_newer_version_has_noted_survives_a_change(store: JobStore, redis: Redis) -> None:
    """While a service is upgraded, processes of two versions write the same records."""
    newer = FIRST_VERSION.replace('"retry_of"', '"zone": {"name": "b"}, "retry_of"')
    newer = newer.replace('"layer": null', '"layer": null, "rank": 3')
    job = rewritten(store, redis, record=newer)
    store.update(job.id, lambda job: transition(job, JobState.CANCELLED))
    written = json.loads(redis.hget(f"nibble:job:{job.id}", "record") or b"")
    assert (written["state"], written["zone"]) == ("cancelled", {"name": "b"})


def test_a_spec_that_only_a_newer_version_knows_is_not_guessed_at(store: JobStore, redis: Redis) -> None:
    """To leave out what it doesn't know would be to compute something else."""
    known, unknown = stored(store), rewritten(store, redis, spec='{"model": "org/name", "pruning": 0.5}')
    with pytest.raises(RecordUnreadable, match="pruning"):
        store.claim(unknown.id, 1, worker="w", lease_s=30)
    assert not store.holds(unknown.id, 1)
    assert [job.id for job in store.page("t", JobFilter()).jobs] == [known.id]


def test_an_id_is_created_once(store: JobStore) -> None:
    job = stored(store)
    assert not store.create(job.model_copy(update={"tenant": "other"}))
    assert store.load(job.id).tenant == "t"


@pytest.mark.parametrize(
    "job_id", ["", "job_x", "*", "job_01M823S510D0DJEWVM94T0ZK2G", "art_01M823S510V90K76AWVS8MS1FM"]
)
def test_what_is_not_there_is_not_found(store: JobStore, job_id: str) -> None:
    with pytest.raises(NotFound):
        store.load(job_id)
    assert store.version(job_id) == 0


def test_another_tenants_job_is_not_found(store: JobStore) -> None:
    job = stored(store)
    for access in (store.get, store.delete):
        with pytest.raises(NotFound):
            access("other", job.id)


def test_each_change_raises_the_version_and_is_announced(store: JobStore, redis: Redis) -> None:
    job = stored(store)
    channel = redis.pubsub(ignore_subscribe_messages=True)
    channel.subscribe(JOB_CHANGES)
    channel.get_message(timeout=5)
    store.update(job.id, lambda job: transition(job, JobState.CANCELLED))
    message = channel.get_message(timeout=5)
    channel.close()
    assert message is not None
    assert message["data"].decode() == job.id
    assert store.version(job.id) == 2


def test_a_change_that_changes_nothing_is_not_written(store: JobStore) -> None:
    job = stored(store)
    store.update(job.id, lambda job: job)
    assert store.version(job.id) == 1


def test_a_change_whose_answer_was_lost_is_made_once(store: JobStore) -> None:
    """The client sends it again, and learns that it was made."""
    swap = store._swap
    store._swap = lambda **asked: [swap(**asked), swap(**asked)][1]
    job = running(store)
    assert (job.state, job.attempt, store.version(job.id)) == (JobState.RUNNING, 1, 2)
    ended = store.update(job.id, lambda job: transition(job, JobState.SUCCEEDED), attempt=1)
    assert (ended.state, store.version(job.id)) == (JobState.SUCCEEDED, 3)
    assert [event.kind for event in store.events(job.id)] == ["state"] * 3


def test_parallel_changes_are_all_kept(store: JobStore) -> None:
    job = running(store)

    def count() -> None:
        for _ in range(10):
            store.update(job.id, lambda job: job.model_copy(update={"artifacts": (*job.artifacts, "x")}))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.load(job.id).artifacts) == 40


def test_one_of_many_claims_wins(store: JobStore) -> None:
    job = stored(store)
    outcomes: list[str] = []

    def claim(name: str) -> None:
        try:
            store.claim(job.id, 1, worker=name, lease_s=30)
            outcomes.append("claimed")
        except Conflict as fault:
            outcomes.append(fault.code)

    threads = [threading.Thread(target=claim, args=(f"w{index}",)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("claimed") == 1
    assert store.load(job.id).attempt == 1


def test_a_terminal_job_never_changes(store: JobStore) -> None:
    job = running(store)
    store.update(job.id, lambda job: transition(job, JobState.SUCCEEDED), attempt=1)
    with pytest.raises(Conflict) as refusal:
        store.update(job.id, lambda job: job.model_copy(update={"artifacts": ("x",)}))
    assert refusal.value.code == "invalid_transition"


def test_the_table_holds_for_every_change(store: JobStore) -> None:
    job = stored(store)
    with pytest.raises(Conflict):
        store.update(job.id, lambda job: job.model_copy(update={"state": JobState.SUCCEEDED}))


def test_a_stale_attempt_is_refused(store: JobStore) -> None:
    job = running(store)
    with pytest.raises(Conflict) as refusal:
        store.update(job.id, lambda job: job.model_copy(update={"worker": "x"}), attempt=2)
    assert refusal.value.code == "stale_attempt"


def test_an_attempt_whose_job_is_queued_again_is_stale(store: JobStore) -> None:
    job = running(store)
    store.update(job.id, lambda job: transition(job, JobState.QUEUED))
    with pytest.raises(Conflict) as refusal:
        store.update(job.id, lambda job: transition(job, JobState.FAILED), attempt=1)
    assert refusal.value.code == "stale_attempt"


def test_states_and_stages_become_events_and_progress_does_not(store: JobStore) -> None:
    job = running(store)
    store.update(job.id, lambda job: job.model_copy(update={"stage": Stage.FETCHING}), attempt=1)
    store.update(job.id, lambda job: job.model_copy(update={"progress": Progress(fraction=0.5)}), attempt=1)
    store.append_event(job.id, "note", {"code": "fallback"})
    kinds = [event.kind for event in store.events(job.id)]
    assert kinds == ["state", "state", "stage", "note"]


def test_events_are_read_on_from_an_id(store: JobStore) -> None:
    job = stored(store)
    ids = [store.append_event(job.id, "note", {"n": n}) for n in range(5)]
    assert [event.payload["n"] for event in store.events(job.id, ids[1], limit=2)] == [2, 3]
    assert store.events(job.id, ids[-1]) == []


def test_a_deleted_job_takes_no_events(store: JobStore, redis: Redis) -> None:
    job = stored(store)
    store.update(job.id, lambda job: transition(job, JobState.CANCELLED))
    store.settle(job.id)
    store.delete("t", job.id)
    with pytest.raises(NotFound):
        store.append_event(job.id, "note", {})
    with pytest.raises(NotFound):
        store.append_once(job.id, "first", "note", {})
    redis.delete("nibble:lines")  # a sweep of the turns strikes the tenant out
    assert redis.keys() == [b"nibble:stamp:jobs:t"]


def test_a_job_is_unsettled_from_its_end_on(store: JobStore) -> None:
    """And can't be deleted so: only its record tells what is to follow."""
    job, ended = stored(store), new_job().model_copy(update={"state": JobState.SUCCEEDED})
    assert store.is_settled(job.id)
    assert store.create(ended)  # with an answer that was there before
    store.update(job.id, lambda job: transition(job, JobState.CANCELLED))
    assert store.unsettled() == sorted([job.id, ended.id])
    with pytest.raises(Conflict) as refusal:
        store.delete("t", job.id)
    assert refusal.value.code == "job_not_settled"
    store.settle(job.id)
    store.delete("t", job.id)
    assert store.unsettled() == [ended.id]


def test_an_event_is_added_once_under_a_name(store: JobStore) -> None:
    job = stored(store)
    assert not store.has_appended(job.id, "first")
    for n in (1, 2):
        store.append_once(job.id, "first", "note", {"n": n})
    store.append_once(job.id, "second", "note", {"n": 3})
    assert store.has_appended(job.id, "first")
    assert [event.payload.get("n") for event in store.events(job.id)] == [None, 1, 3]
    assert store.load(job.id) == job


def test_a_living_job_is_not_deleted(store: JobStore) -> None:
    job = stored(store)
    with pytest.raises(Conflict) as refusal:
        store.delete("t", job.id)
    assert refusal.value.code == "job_not_finished"


def test_pages_go_from_new_to_old_without_gaps(store: JobStore) -> None:
    jobs = [stored(store, parity=str(index % 2)) for index in range(7)]
    newest_first = sorted((job.id for job in jobs), reverse=True)
    seen: list[str] = []
    after = None
    while True:
        page = store.page("t", JobFilter(limit=3, after=after))
        seen += [job.id for job in page.jobs]
        if not page.has_more:
            break
        after = seen[-1]
    assert seen == newest_first
    assert store.page("other", JobFilter()).jobs == ()


def test_pages_are_filtered(store: JobStore) -> None:
    jobs = [stored(store, parity=str(index % 2)) for index in range(4)]
    store.update(jobs[1].id, lambda job: transition(job, JobState.CANCELLED))
    odd = store.page("t", JobFilter(labels={"parity": "1"}))
    assert {job.id for job in odd.jobs} == {jobs[1].id, jobs[3].id}
    cancelled = store.page("t", JobFilter(state=JobState.CANCELLED, labels={"parity": "1"}))
    assert [job.id for job in cancelled.jobs] == [jobs[1].id]


def test_a_page_after_what_is_no_id_is_refused(store: JobStore) -> None:
    with pytest.raises(MalformedRequest):
        store.page("t", JobFilter(after="[x"))


def test_counts_follow_the_states(store: JobStore) -> None:
    stored(store)
    job = running(store)
    assert store.counts()[JobState.QUEUED] == 1
    assert store.in_state(JobState.RUNNING) == [job.id]


def test_jobs_of_several_states_are_read_at_one_moment(store: JobStore, redis: Redis) -> None:
    """Between two questions a job could go from the second state to the first, and be in neither."""
    waiting, at_work = stored(store), running(store)
    redis.config_resetstat()
    assert store.in_state(JobState.QUEUED, JobState.RUNNING) == sorted([waiting.id, at_work.id])
    asked = {name: int(counts["calls"]) for name, counts in redis.info("commandstats").items()}
    assert asked["cmdstat_sunion"] == 1
    assert "cmdstat_smembers" not in asked


def test_a_lease_belongs_to_one_attempt(store: JobStore) -> None:
    job = running(store)
    assert store.holds(job.id, 1)
    assert store.renew(job.id, 1, 30)
    assert not store.renew(job.id, 2, 30)
    assert not store.release(job.id, 2)
    assert store.release(job.id, 1)
    assert not store.renew(job.id, 1, 30)
