"""Attempts run in this process, with a child that stands in for the engine."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from app.core.errors import JobFault
from app.core.jobs.job_queue import Place
from app.core.jobs.job_store import JobStore
from app.core.jobs.unfinished import unfinished_report
from app.core.records.ids import artifact_id
from app.core.records.job import Job, JobState, Progress
from app.core.records.job_changes import cancel_requested, requeued
from app.core.records.serving_options import DeploymentOptions
from app.core.records.specs import JobSpec
from app.core.storage.published import published_before
from app.core.storage.reuse import ReuseIndex
from app.core.storage.storage_keys import checkpoint_prefix, manifest_key, report_key
from app.core.telemetry.logs import ids_of
from app.core.telemetry.tally import Tally
from tests.integration.workshop import MODEL, Workshop
from tests.waiting import wait_until
from workers.attempts import attempt as attempts
from workers.attempts import resource_use
from workers.attempts.attempt import run_attempt
from workers.attempts.attempt_record import AttemptRecord
from workers.attempts.ending import Ending
from workers.attempts.watch import StopReason, Watch


@pytest.fixture
def workshop(redis: Redis, redis_url: str, tmp_path: Path) -> Workshop:
    return Workshop(redis, redis_url, tmp_path / "state")


def during(action: Callable[[], object]) -> threading.Thread:
    """Run `action` beside an attempt."""
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def wait_for_checkpoint(workshop: Workshop, job: Job) -> None:
    wait_until(lambda: "checkpoint" in workshop.kinds(job))


def test_a_running_jobs_use_is_in_its_record_while_it_runs(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource_use, "EVERY_S", 0.05)
    monkeypatch.setattr(attempts, "USE_S", 0.1)
    job = workshop.submit(fault="hang")
    attempt = during(lambda: workshop.run(job))

    def samples() -> int:
        use = workshop.store.load(job.id).progress.use
        return 0 if use is None else len(use.memory_bytes)

    # It hangs after two layers: what is new from then on is its use alone.
    wait_until(lambda: workshop.store.load(job.id).progress.layer == 2)
    before = samples()
    wait_until(lambda: samples() > before + 3)
    progress = workshop.store.load(job.id).progress
    assert (progress.layer, progress.fraction) == (2, 0.5)
    assert progress.use is not None
    assert max(progress.use.memory_bytes) > 10_000_000
    workshop.store.update(job.id, cancel_requested)
    attempt.join()
    ended = workshop.store.load(job.id)
    assert ended.state is JobState.CANCELLED
    assert ended.progress == Progress(fraction=0.5, layer=2, layers=4)


def test_a_process_that_crashed_leaves_its_peak(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource_use, "EVERY_S", 0.02)
    job = workshop.run(workshop.submit(fault="exit", pause="0.2"))
    report = unfinished_report(job, workshop.store.events(job.id, limit=1000))
    assert report.peak_rss_bytes is not None
    assert report.peak_rss_bytes > 10_000_000
    assert report.output == "the last words\n"


def test_a_job_is_published_once_and_leaves_nothing_behind(workshop: Workshop) -> None:
    job = workshop.run(workshop.submit())
    assert job.state is JobState.SUCCEEDED
    assert job.artifacts == (artifact_id(job.id, 0, "compressed-tensors"),)
    assert job.progress == Progress(fraction=1.0, layer=4, layers=4)
    manifest = workshop.manifest(job)
    assert manifest is not None
    assert manifest.prefix == "attempt-1"
    assert [file.path for file in manifest.files] == ["config.json", "model.safetensors"]
    assert workshop.objects.get(report_key(job.id)) == b"{}"
    assert workshop.objects.list(checkpoint_prefix(job.id)) == []
    assert list(workshop.settings.scratch_dir.iterdir()) == []
    assert not workshop.store.holds(job.id, 1)


def test_lines_of_an_attempt_carry_request_job_and_attempt(
    workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    job = workshop.submit()
    workshop.store.update(job.id, lambda job: job.model_copy(update={"request_id": "req-7"}))
    told: list[dict[str, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(ids_of(record))  # type: ignore[method-assign]
    logging.getLogger("workers.attempts.attempt").addHandler(handler)
    with caplog.at_level(logging.INFO, "workers.attempts.attempt"):
        workshop.run(job)
    logging.getLogger("workers.attempts.attempt").removeHandler(handler)
    assert told[0] == told[-1] == {"request": "req-7", "job": job.id, "attempt": "1"}
    assert set(Tally(workshop.redis).stages()) == {"fetching", "calibrating", "publishing"}


def test_a_job_resumes_and_publishes_in_s3(
    redis: Redis, redis_url: str, tmp_path: Path, s3_endpoint: str
) -> None:
    assert httpx.put(f"{s3_endpoint}/store").status_code == 200
    workshop = Workshop(redis, redis_url, tmp_path / "state", storage_url="s3://store/nibble")
    job = workshop.submit(pause="0.3")

    def stop() -> None:
        wait_for_checkpoint(workshop, job)
        workshop.shutdown.set()

    thread = during(stop)
    assert workshop.run(job).state is JobState.QUEUED
    thread.join()
    workshop.shutdown.clear()
    ended = workshop.run(job, attempt=2)
    assert ended.state is JobState.SUCCEEDED
    assert workshop.kinds(job).count("checkpoint") == 4
    manifest = workshop.manifest(job)
    assert manifest is not None
    assert manifest.prefix == "attempt-2"
    assert workshop.objects.list(checkpoint_prefix(job.id)) == []


def test_the_child_sees_no_keys(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "NIBBLE_REDIS_URL", "NIBBLE_BOOTSTRAP_API_KEY"):
        monkeypatch.setenv(name, "secret")
    job = workshop.run(workshop.submit())
    seen = workshop.payload(job, "note")["detail"]
    assert isinstance(seen, dict)
    names = set(seen["names"])
    assert {"PATH", "TMPDIR", "HF_HUB_OFFLINE"} <= names
    told = names - {"NIBBLE_CHILD_NETWORK"}  # set by the child's own first code
    assert not [name for name in told if name.startswith(("AWS_", "HF_TOKEN", "NIBBLE_"))]


def test_the_setting_of_the_kernels_reaches_the_child(redis: Redis, redis_url: str, tmp_path: Path) -> None:
    workshop = Workshop(redis, redis_url, tmp_path / "state", kernel_backend="triton")
    job = workshop.run(workshop.submit())
    seen = workshop.payload(job, "note")["detail"]
    assert isinstance(seen, dict)
    assert seen["kernel_backend"] == "triton"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("exit", "child_crashed"),
        ("babble", "child_protocol"),
        ("report", "target_missed"),
        ("out_of_memory", "out_of_memory"),
    ],
)
def test_a_child_that_fails_fails_its_job(workshop: Workshop, fault: str, code: str) -> None:
    job = workshop.run(workshop.submit(fault=fault))
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.code == code
    assert job.error.remedy
    assert workshop.payload(job, "failure")["code"] == code
    assert workshop.manifest(job) is None


def test_a_killed_child_is_started_again_after_a_pause(workshop: Workshop) -> None:
    job = workshop.submit(fault="kill")
    for attempt in (1, 2):
        waiting = workshop.run(job, attempt)
        assert (waiting.state, waiting.attempt) == (JobState.QUEUED, attempt)
        workshop.sweep()
        assert sum(workshop.queue.depths().values()) == 0
        workshop.redis.delete(f"nibble:postponed:{job.id}")
        workshop.sweep()
        assert workshop.queue.locate(workshop.store.load(job.id)) is Place.WAITING
        workshop.queue.remove(waiting)
    ended = workshop.run(job, 3)
    assert ended.error is not None
    assert (ended.state, ended.error.code) == (JobState.FAILED, "child_killed")
    assert [event.payload["pause_s"] for event in workshop.store.events(job.id) if event.kind == "retry"] == [
        5.0, 15.0,
    ]  # fmt: skip


def test_a_lost_device_is_met_again_after_a_pause(workshop: Workshop) -> None:
    job = workshop.submit(fault="device_failed")
    for attempt, pause_s in ((1, 5.0), (2, 15.0)):
        waiting = workshop.run(job, attempt)
        assert (waiting.state, waiting.attempt) == (JobState.QUEUED, attempt)
        retries = [event.payload for event in workshop.store.events(job.id) if event.kind == "retry"]
        assert (retries[-1]["code"], retries[-1]["pause_s"]) == ("device_failed", pause_s)
    ended = workshop.run(job, 3)
    assert ended.error is not None
    assert (ended.state, ended.error.code) == (JobState.FAILED, "device_failed")


def test_a_missed_target_leaves_its_report(workshop: Workshop) -> None:
    job = workshop.run(workshop.submit(fault="report"))
    assert job.state is JobState.FAILED
    assert json.loads(workshop.objects.get(report_key(job.id))) == {"tries": [], "published": []}
    assert published_before(workshop.objects, job) is None  # a report alone publishes nothing


def test_the_last_words_of_a_child_are_kept(workshop: Workshop) -> None:
    job = workshop.run(workshop.submit(fault="exit"))
    assert "the last words" in str(workshop.payload(job, "failure")["output"])


@pytest.mark.parametrize("fault", ["hang", "deaf"])
def test_cancel_stops_a_running_job(workshop: Workshop, fault: str) -> None:
    job = workshop.submit(fault=fault)

    def cancel() -> None:
        wait_for_checkpoint(workshop, job)
        workshop.store.update(job.id, cancel_requested)

    thread = during(cancel)
    ended = workshop.run(job)
    thread.join()
    assert ended.state is JobState.CANCELLED
    assert workshop.manifest(job) is None
    assert workshop.objects.list(checkpoint_prefix(job.id)) == []


def test_a_job_ends_at_its_deadline(workshop: Workshop) -> None:
    job = workshop.run(workshop.submit(fault="hang", timeout_s=2))
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.code == "deadline_exceeded"
    assert "nibble submit --timeout" in job.error.remedy


def test_a_stopping_worker_gives_its_job_back_and_the_next_attempt_resumes(workshop: Workshop) -> None:
    job = workshop.submit(pause="0.3", layers="6")

    def stop() -> None:
        wait_for_checkpoint(workshop, job)
        workshop.shutdown.set()

    thread = during(stop)
    waiting = workshop.run(job)
    thread.join()
    assert waiting.state is JobState.QUEUED
    assert sum(workshop.queue.depths().values()) == 1
    workshop.shutdown.clear()
    ended = workshop.run(job, attempt=2)
    assert ended.state is JobState.SUCCEEDED
    assert workshop.kinds(job).count("checkpoint") == 6
    assert workshop.payload(job, "resumed")["attempt"] == 2


def test_a_damaged_stored_checkpoint_is_computed_again(workshop: Workshop) -> None:
    """The bytes are those of a job that nothing had happened to."""
    failed = workshop.run(workshop.submit(fault="exit"))
    stored = workshop.objects.list(checkpoint_prefix(failed.id))[1].key
    content = workshop.objects.get(stored)
    workshop.objects.put(stored, content[:5] + bytes([content[5] ^ 1]) + content[6:])
    job = workshop.submit()
    workshop.store.update(job.id, lambda job: job.model_copy(update={"retry_of": failed.id}))
    assert workshop.run(job).state is JobState.SUCCEEDED
    assert workshop.payload(job, "resumed")["checkpoints"] == ["layer-0"]
    notes = [event.payload for event in workshop.store.events(job.id) if event.kind == "note"]
    assert any(note["code"] == "checkpoint_damaged" and "layer-1" in str(note["message"]) for note in notes)
    unbroken, resumed = workshop.run(workshop.submit()), workshop.manifest(job)
    first = workshop.manifest(unbroken)
    assert first is not None
    assert resumed is not None
    assert first.files == resumed.files


@pytest.mark.parametrize("attempt", [0, 2, 7])
def test_a_delivery_out_of_turn_is_left_alone(workshop: Workshop, attempt: int) -> None:
    job = workshop.submit()
    assert workshop.run(job, attempt) == job


def test_a_duplicate_delivery_is_left_alone(workshop: Workshop) -> None:
    ended = workshop.run(workshop.submit())
    assert workshop.run(ended, attempt=1) == ended
    assert workshop.kinds(ended).count("resumed") == 0


def test_a_delivery_for_a_newer_version_is_left_to_it(workshop: Workshop) -> None:
    job, key = workshop.submit(), "nibble:job:{}"
    workshop.redis.hset(key.format(job.id), "spec", '{"model": "org/name", "pruning": 0.5}')
    run_attempt(workshop.context(), job.id, 1)
    assert workshop.store.version(job.id) == 1
    assert not workshop.store.holds(job.id, 1)


def test_an_attempt_whose_job_a_newer_version_took_up_stops(workshop: Workshop) -> None:
    job, key = workshop.submit(fault="hang"), "nibble:job:{}"
    spec = workshop.redis.hget(key.format(job.id), "spec")

    def upgrade() -> None:
        wait_for_checkpoint(workshop, job)
        workshop.redis.hset(key.format(job.id), "spec", '{"model": "org/name", "pruning": 0.5}')

    thread = during(upgrade)
    run_attempt(workshop.context(), job.id, 1)
    thread.join()
    workshop.redis.hset(key.format(job.id), "spec", spec)
    left = workshop.store.load(job.id)
    assert (left.state, left.error) == (JobState.RUNNING, None)
    assert not workshop.store.holds(job.id, 1)
    workshop.sweep()
    assert workshop.store.load(job.id).state is JobState.QUEUED


def test_an_attempt_waits_while_redis_is_full(workshop: Workshop) -> None:
    job, refusals = workshop.submit(layers="6", pause="0.1"), "errorstat_OOM"

    def fill() -> None:
        wait_for_checkpoint(workshop, job)
        workshop.redis.config_resetstat()
        workshop.redis.config_set("maxmemory", 1)
        wait_until(lambda: refusals in workshop.redis.info("errorstats"))
        workshop.redis.config_set("maxmemory", 0)

    thread = during(fill)
    ended = workshop.run(job)
    thread.join()
    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 1)


def test_an_attempt_waits_while_redis_does_not_answer(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it only asks: whether the same was made before, and for its lease before the commit."""
    lost: list[str] = []

    def losing_the_first(kind: type, name: str) -> None:
        ask = getattr(kind, name)

        def answer(*arguments: object) -> object:
            if name not in lost:
                lost.append(name)
                raise RedisConnectionError(name)
            return ask(*arguments)

        monkeypatch.setattr(kind, name, answer)

    losing_the_first(ReuseIndex, "find")
    losing_the_first(JobStore, "holds")
    ended = workshop.run(workshop.record(JobSpec(model=MODEL)))
    assert lost == ["find", "holds"]
    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 1)


def test_an_attempt_that_was_halted_leaves_the_files_of_its_successor(workshop: Workshop) -> None:
    job = workshop.submit()
    newer = workshop.settings.scratch_dir / f"{job.id}-2"
    newer.mkdir()
    assert workshop.run(job).state is JobState.SUCCEEDED
    assert newer.exists()


def test_an_attempt_without_its_lease_does_not_fail_its_job(workshop: Workshop) -> None:
    """It was halted, and another worker of the host has removed its files."""
    job = workshop.store.claim(workshop.submit().id, 1, worker="w", lease_s=30)
    context = workshop.context()
    watch = Watch(context.store, job, lease_s=30, shutdown=workshop.shutdown)
    workshop.store.release(job.id, 1)
    Ending(context, AttemptRecord(context.store, job, watch)).fail(JobFault("no such file"))
    assert workshop.store.load(job.id).state is JobState.RUNNING
    workshop.store.acquire(job.id, 1, 30)
    Ending(context, AttemptRecord(context.store, job, watch)).fail(JobFault("no such file"))
    assert workshop.store.load(job.id).state is JobState.FAILED


def test_a_cancelled_attempt_whose_job_has_succeeded_withdraws_nothing(workshop: Workshop) -> None:
    """A janitor has found the job published and without a lease, before its worker could end it."""
    job = workshop.run(workshop.submit())
    context = workshop.context()
    watch = Watch(context.store, job, lease_s=3, shutdown=workshop.shutdown)
    Ending(context, AttemptRecord(context.store, job, watch)).stop(StopReason.CANCELLED)
    assert workshop.store.load(job.id).state is JobState.SUCCEEDED
    assert workshop.manifest(job) is not None


def test_a_delivery_of_a_deleted_job_is_left_alone(workshop: Workshop) -> None:
    job = workshop.run(workshop.submit())
    workshop.store.delete("default", job.id)
    run_attempt(workshop.context(), job.id, 2)
    assert workshop.store.version(job.id) == 0


def test_an_attempt_that_lost_its_lease_writes_nothing(workshop: Workshop) -> None:
    job = workshop.submit(fault="hang")

    def take_over() -> None:
        wait_for_checkpoint(workshop, job)
        workshop.store.release(job.id, 1)
        workshop.store.update(job.id, requeued)

    thread = during(take_over)
    left = workshop.run(job)
    thread.join()
    assert left.state is JobState.QUEUED
    assert left.error is None
    assert workshop.objects.list("artifacts") == []


def test_a_crash_between_manifest_and_record_is_made_good(workshop: Workshop) -> None:
    """The next attempt finds all manifests and only writes the record."""
    job = workshop.submit()
    art_id = artifact_id(job.id, 0, "compressed-tensors")
    workshop.objects.put(report_key(job.id), b"{}")
    workshop.objects.put(manifest_key(art_id), b"{}")
    ended = workshop.run(job)
    assert ended.state is JobState.SUCCEEDED
    assert ended.artifacts == (art_id,)
    assert "checkpoint" not in workshop.kinds(job)


def test_a_second_attempt_keeps_the_first_manifest(workshop: Workshop) -> None:
    """Without its report the job runs again; the manifest of the first attempt stands."""
    job = workshop.run(workshop.submit())
    first = workshop.manifest(job)
    workshop.objects.delete(report_key(job.id))
    record = job.model_copy(update={"state": JobState.QUEUED, "artifacts": (), "finished_at": None})
    workshop.store.delete("default", job.id)
    assert workshop.store.create(record)
    ended = workshop.run(record, attempt=2)
    assert ended.state is JobState.SUCCEEDED
    assert workshop.manifest(job) == first
    folders = workshop.objects.list_folders(f"artifacts/{job.artifacts[0]}")
    assert folders == ["attempt-1"]


def test_a_retry_goes_on_from_the_failed_jobs_checkpoints(workshop: Workshop) -> None:
    failed = workshop.run(workshop.submit(fault="exit"))
    job = workshop.submit()
    workshop.store.update(job.id, lambda job: job.model_copy(update={"retry_of": failed.id}))
    ended = workshop.run(job)
    assert ended.state is JobState.SUCCEEDED
    assert workshop.payload(job, "resumed")["checkpoints"] == ["layer-0", "layer-1"]


def test_a_model_that_has_gone_fails_the_job(workshop: Workshop, tmp_path: Path) -> None:
    job = workshop.run(workshop.submit(model=(tmp_path / "nowhere").as_uri()))
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.code == "model_path_forbidden"


def test_deploy_in_a_job_serves_its_first_artifact_once(workshop: Workshop) -> None:
    spec = JobSpec(model=MODEL, deploy=DeploymentOptions(name="tiny", idle_timeout_s=60))
    first, second = workshop.record(spec), workshop.record(spec)
    assert workshop.run(first).state is JobState.SUCCEEDED
    deployed = workshop.deployments.all()
    assert [live.spec.name for live in deployed] == ["tiny"]
    assert deployed[0].spec.artifact == workshop.store.load(first.id).artifacts[0]
    assert (deployed[0].deployment.job, deployed[0].spec.idle_timeout_s) == (first.id, 60)
    assert workshop.payload(first, "deployed")["deployment"] == deployed[0].id
    # The name is in use by now: the job succeeds, and says why nothing was deployed.
    assert workshop.run(second).state is JobState.SUCCEEDED
    assert len(workshop.deployments.all()) == 1
    assert "deployment_name_taken" in str(workshop.store.events(second.id))
