"""What lies in storage and nobody needs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from redis import Redis
from ulid import ULID

from app.core.access.limits import TenantLimits
from app.core.records.ids import artifact_id, new_id
from app.core.records.job import Job, JobState
from app.core.records.job_changes import cancel_requested
from app.core.records.specs import TargetSpec
from app.core.storage.object_store import ObjectStore
from app.core.storage.published import withdraw
from app.core.storage.storage_keys import checkpoint_prefix, manifest_key, report_key
from app.core.storage.tags import Tags
from app.core.upkeep.garbage import GarbageCollector
from tests.integration.api_service import Service
from tests.integration.workshop import Workshop


@pytest.fixture
def workshop(redis: Redis, redis_url: str, tmp_path: Path) -> Workshop:
    return Workshop(redis, redis_url, tmp_path / "state", retention_days=30)


@pytest.fixture
def new_collector(workshop: Workshop) -> Callable[[], GarbageCollector]:
    limits = TenantLimits(workshop.redis, workshop.settings)
    tags = Tags(workshop.redis)
    return lambda: GarbageCollector(workshop.store, workshop.objects, limits, tags, workshop.settings)


@pytest.fixture
def collector(new_collector: Callable[[], GarbageCollector]) -> GarbageCollector:
    return new_collector()


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


@pytest.mark.parametrize("has_target", [False, True])
def test_what_is_withdrawn_is_found_by_its_ids(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, has_target: bool
) -> None:
    """All of a folder are looked through only where a search for a target may have added recipes."""
    job = workshop.run(workshop.submit())
    manifest = workshop.manifest(job)
    assert manifest is not None
    ids = {manifest.id}
    if has_target:
        spec = job.spec.model_copy(update={"target": TargetSpec(max_kl=0.1)})
        job = job.model_copy(update={"spec": spec})
        added = manifest.model_copy(update={"id": artifact_id(job.id, 7, manifest.format)})
        workshop.objects.put(manifest_key(added.id), added.model_dump_json().encode())
        ids.add(added.id)
    else:
        monkeypatch.setattr(ObjectStore, "list_folders", None)
    assert set(withdraw(workshop.objects, workshop.context().limits, job)) == ids
    assert workshop.objects.list("artifacts") == []


def test_only_the_bytes_of_jobs_that_succeeded_are_counted(
    workshop: Workshop, new_collector: Callable[[], GarbageCollector]
) -> None:
    """An artifact of a job that goes on may be withdrawn yet, and takes its bytes along."""
    collector = new_collector()
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
    collector = new_collector()  # one that has not seen the job at its end, from which no job comes back
    collector.collect()
    assert (workshop.manifest(done) is not None, limits.stored_bytes("default")) == (True, 0)
    limits.add_artifact("default", art_id, size)
    workshop.store.update(done.id, cancel_requested)
    assert collector.collect().artifacts == (f"artifacts/{art_id}",)
    assert limits.stored_bytes("default") == 0


def test_records_go_after_their_time_and_artifacts_stay(
    workshop: Workshop, collector: GarbageCollector
) -> None:
    past = datetime.now(UTC) - timedelta(days=31)
    fresh = workshop.run(workshop.submit())
    old = fresh.model_copy(update={"id": f"job_{ULID.from_datetime(past)}", "created_at": past})
    assert workshop.store.create(old.model_copy(update={"state": JobState.QUEUED, "attempt": 0}))
    done = workshop.run(old)
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


def test_the_second_collection_reads_no_manifest_again(
    workshop: Workshop, collector: GarbageCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order once, in order for good: a collection costs what was made since the last one."""
    first = workshop.run(workshop.submit())
    collector.collect()
    read: list[str] = []
    get = workshop.objects.get
    monkeypatch.setattr(workshop.objects, "get", lambda key: read.append(key) or get(key))
    collector.collect()
    assert read == []
    second = workshop.run(workshop.submit())
    read.clear()
    collector.collect()
    assert read == [manifest_key(second.artifacts[0])]
    workshop.objects.delete(manifest_key(first.artifacts[0]))
    workshop.objects.delete_prefix(f"artifacts/{first.artifacts[0]}")
    assert collector.collect().count == 0


def test_lists_read_the_tenants_own_artifacts_once_all_are_counted(service: Service) -> None:
    """Before that, all of storage: what a Redis that lost its data does not know is listed too."""
    limits = TenantLimits(service.redis, service.settings)
    job_id = service.submit()["id"]
    own = service.publish(job_id, {"config.json": b"{}"})
    service.publish(job_id, {"config.json": b"{}"}, tenant="other", format_name="gptq")
    assert limits.artifacts("default") is None

    def listed() -> list[str]:
        return [each["id"] for each in service.client.get("/v1/artifacts").json()["data"]]

    assert listed() == [own.id]
    service.end(job_id)
    tags = Tags(service.redis)
    GarbageCollector(service.store, service.objects, limits, tags, service.settings).collect()
    assert limits.artifacts("default") == [own.id]
    assert listed() == [own.id]
    assert [each["id"] for each in service.client.get("/v1/registry").json()["data"][0]["versions"]] == [
        own.id
    ]
    service.redis.flushdb()
    assert limits.artifacts("default") is None
