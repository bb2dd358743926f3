"""What lies in storage and nobody needs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from redis import Redis

from app.core.access.limits import TenantLimits
from app.core.records.ids import artifact_id, new_id
from app.core.records.job import Job, JobState
from app.core.records.job_changes import cancel_requested
from app.core.storage.published import withdraw
from app.core.storage.storage_keys import checkpoint_prefix, manifest_key, report_key
from app.core.upkeep.garbage import GarbageCollector
from tests.integration.api_service import Service
from tests.integration.workshop import Workshop


@pytest.fixture
def workshop(redis: Redis, redis_url: str, tmp_path: Path) -> Workshop:
    return Workshop(redis, redis_url, tmp_path / "state", retention_days=30)


@pytest.fixture
def collector(workshop: Workshop) -> GarbageCollector:
    limits = TenantLimits(workshop.redis, workshop.settings)
    return GarbageCollector(workshop.store, workshop.objects, limits, workshop.settings)


def half_published(workshop: Workshop, job: Job) -> str:
    """What an attempt has uploaded before its manifest."""
    folder = f"artifacts/{artifact_id(job.id, 0, 'awq')}"
    workshop.objects.put(f"{folder}/attempt-1/model.safetensors", b"half")
    return folder


def test_what_living_and_failed_jobs_need_stays(workshop: Workshop, collector: GarbageCollector) -> None:
    active, failed = workshop.submit(), workshop.run(workshop.submit(fault="exit"))
    workshop.objects.put(f"{checkpoint_prefix(active.id)}/k/layer-0", b"1")
    half_published(workshop, active)
    done = workshop.run(workshop.submit())
    before = [head.key for head in workshop.objects.list("artifacts")]
    assert collector.collect().count == 0
    assert [head.key for head in workshop.objects.list("artifacts")] == before
    assert workshop.objects.list(checkpoint_prefix(failed.id))
    assert workshop.manifest(done) is not None


def test_what_nobody_needs_is_named_and_then_removed(workshop: Workshop, collector: GarbageCollector) -> None:
    gone = new_id("job")
    workshop.objects.put(f"{checkpoint_prefix(gone)}/k/layer-0", b"1")
    cancelled = workshop.store.update(workshop.submit().id, cancel_requested)
    half = half_published(workshop, cancelled)
    done = workshop.run(workshop.submit())
    stale = f"artifacts/{done.artifacts[0]}/attempt-9"
    workshop.objects.put(f"{stale}/model.safetensors", b"late")
    named = collector.collect(dry_run=True)
    assert named.checkpoints == (checkpoint_prefix(gone),)
    assert set(named.artifacts) == {half, stale}
    assert collector.collect() == named
    assert collector.collect().count == 0
    assert workshop.objects.list(half) == []
    assert workshop.manifest(done) is not None


def test_what_a_failed_job_made_visible_is_withdrawn(workshop: Workshop, collector: GarbageCollector) -> None:
    """It failed after the manifest of its first format."""
    done = workshop.run(workshop.submit())
    other = workshop.run(workshop.submit())
    record = done.model_copy(update={"state": JobState.FAILED, "artifacts": ()})
    workshop.store.delete("default", done.id)
    assert workshop.store.create(record)
    assert collector.collect().artifacts == (f"artifacts/{done.artifacts[0]}",)
    assert workshop.manifest(done) is None
    assert withdraw(workshop.objects, workshop.context().limits, other) == [other.artifacts[0]]
    assert workshop.objects.list("artifacts") == []


def test_only_the_bytes_of_jobs_that_succeeded_are_counted(
    workshop: Workshop, collector: GarbageCollector
) -> None:
    """An artifact of a job that goes on may be withdrawn yet, and takes its bytes along."""
    limits, done = workshop.context().limits, workshop.run(workshop.submit())
    (art_id,) = done.artifacts
    size = limits.stored_bytes("default")
    assert size > 0
    limits.remove_artifact("default", art_id)
    collector.collect()
    assert limits.stored_bytes("default") == size
    limits.remove_artifact("default", art_id)
    workshop.store.delete("default", done.id)
    assert workshop.store.create(
        done.model_copy(update={"state": JobState.QUEUED, "artifacts": (), "finished_at": None})
    )
    collector.collect()
    assert (workshop.manifest(done) is not None, limits.stored_bytes("default")) == (True, 0)
    limits.add_artifact("default", art_id, size)
    workshop.store.update(done.id, cancel_requested)
    assert collector.collect().artifacts == (f"artifacts/{art_id}",)
    assert limits.stored_bytes("default") == 0


def test_records_go_after_their_time_and_artifacts_stay(
    workshop: Workshop, collector: GarbageCollector
) -> None:
    done, fresh = workshop.run(workshop.submit()), workshop.run(workshop.submit())
    past = datetime.now(UTC) - timedelta(days=31)
    workshop.store.delete("default", done.id)
    assert workshop.store.create(done.model_copy(update={"finished_at": past}))
    collector.collect()
    assert workshop.store.version(done.id) > 0  # what follows from its end is not done
    workshop.sweep()
    assert collector.collect().jobs == (done.id,)
    assert workshop.store.version(done.id) == 0
    assert workshop.objects.head(report_key(done.id)) is None
    assert workshop.objects.head(manifest_key(done.artifacts[0])) is not None
    assert workshop.store.version(fresh.id) > 0


def test_a_worker_that_died_after_its_commit_point_has_succeeded(workshop: Workshop) -> None:
    """Also if its owner has asked to stop, and if no attempt is left."""
    done = workshop.run(workshop.submit())
    for state in (JobState.RUNNING, JobState.CANCELLING):
        record = done.model_copy(update={"state": state, "artifacts": (), "finished_at": None, "attempt": 3})
        workshop.store.delete("default", done.id)
        assert workshop.store.create(record)
        workshop.sweep()
        found = workshop.store.load(done.id)
        assert (found.state, found.artifacts) == (JobState.SUCCEEDED, done.artifacts)


def test_the_operator_collects_over_the_api(service: Service) -> None:
    service.objects.put(f"{checkpoint_prefix(new_id('job'))}/k/layer-0", b"1")
    named = service.client.post("/v1/gc", params={"dry_run": "true"}).json()
    removed = service.client.post("/v1/gc").json()
    assert named["checkpoints"] == removed["checkpoints"]
    assert len(removed["checkpoints"]) == 1
    assert service.client.post("/v1/gc").json()["checkpoints"] == []


def test_what_cannot_be_read_is_left_alone_and_holds_up_nothing(
    workshop: Workshop, collector: GarbageCollector
) -> None:
    """A manifest that was damaged, a job that only a newer version knows."""
    damaged, newer, gone = workshop.run(workshop.submit()), workshop.submit(), new_id("job")
    workshop.objects.put(manifest_key(damaged.artifacts[0]), b'{"id": "art')
    workshop.redis.hset(f"nibble:job:{newer.id}", "spec", '{"model": "org/name", "pruning": 0.5}')
    for job_id in (newer.id, gone):
        workshop.objects.put(f"{checkpoint_prefix(job_id)}/k/layer-0", b"1")
    named = collector.collect()
    assert (named.checkpoints, named.artifacts) == ((checkpoint_prefix(gone),), ())
    assert withdraw(workshop.objects, workshop.context().limits, damaged) == []
    assert workshop.objects.list(f"artifacts/{damaged.artifacts[0]}/attempt-1")
