"""Whatever breaks: every accepted job ends once, with one artifact or none, and nothing is left behind.

FAULTS and SEED choose the length and the course: `make faults` runs the long form.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from app.core.access.limits import TenantLimits
from app.core.records.ids import artifact_id
from app.core.records.job import Job, JobState
from app.core.settings import Settings
from app.core.sources.fetching import ModelCache
from app.core.storage.artifact_store import file_key
from app.core.storage.object_store import ObjectStore
from app.core.storage.published import read_manifest
from app.core.storage.tags import Tags
from app.core.upkeep.garbage import GarbageCollector
from tests.faults.history import violations
from tests.faults.storm import Storm
from tests.faults.world import World, running_world
from tests.integration.api_service import EXAMPLES, MODEL
from tests.integration.workshop import processes_with
from tests.waiting import wait_until

FAULTS = int(os.environ.get("FAULTS", "10"))
SEED = int(os.environ.get("SEED", "1"))


def unbroken_weights(settings: Settings) -> Callable[[int], str]:
    """SHA-256 of the weights file that a job of so many layers makes when nothing disturbs it."""
    digest = ModelCache(settings.state_dir / "cache", settings).fetch(MODEL, lambda _: None).digest

    def weights(layers: int) -> str:
        value = digest
        for layer in range(layers):
            value = hashlib.sha256(f"{value}{layer}".encode()).hexdigest()
        return hashlib.sha256((value * 100).encode()).hexdigest()

    return weights


def check_artifact(objects: ObjectStore, job: Job, expected: str) -> None:
    """Just one, whole, with the bytes of an unbroken run."""
    art_id = artifact_id(job.id, 0, "compressed-tensors")
    assert job.artifacts == (art_id,)
    manifest = read_manifest(objects, art_id)
    assert manifest is not None, f"{job.id} has succeeded without an artifact"
    assert objects.list_folders(f"artifacts/{art_id}") == [manifest.prefix]
    for file in manifest.files:
        content = objects.get(file_key(manifest, file.path))
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.size, file.sha256)
    assert {file.path: file.sha256 for file in manifest.files}["model.safetensors"] == expected


def check_jobs(world: World, storm: Storm, objects: ObjectStore, weights: Callable[[int], str]) -> None:
    assert len(set(storm.jobs.values())) == len(storm.jobs)
    recorded = {job_id.decode() for job_id in world.redis.zrange("nibble:jobs:default", 0, -1)}
    assert recorded == set(storm.jobs.values()), "a job was recorded that nobody was told of, or lost"
    made = set()
    for job_id in storm.jobs.values():
        job = world.store.load(job_id)
        events = world.store.events(job_id, limit=10_000)
        assert violations(job, events) == [], [(event.kind, event.payload) for event in events]
        assert job.state is not JobState.FAILED, (job.error, [event.payload for event in events][-5:])
        if job_id not in storm.cancelled:
            assert job.state is JobState.SUCCEEDED, (job.error, [event.payload for event in events][-5:])
        if job.state is JobState.SUCCEEDED:
            check_artifact(objects, job, weights(storm.layers[job_id]))
            made.add(job.artifacts[0])
    assert set(objects.list_folders("artifacts")) == made
    for follower in storm.followers:
        assert follower.seen == [event.id for event in world.store.events(follower.job_id, limit=10_000)]


def test_nothing_is_lost_in_a_storm(s3_endpoint: str, tmp_path: Path) -> None:
    with running_world(tmp_path / "world", s3_endpoint) as world, closing(Storm(world, SEED)) as storm:
        storm.rage(FAULTS)
        storm.settle(limit_s=400)
        settings = Settings(state_dir=tmp_path / "own", model_roots=(EXAMPLES,))
        storm.await_workers(limit_s=60)
        for worker in world.workers:
            worker.popen.terminate()
        for worker in world.workers:
            worker.popen.wait(60)
        objects = world.objects()
        limits = TenantLimits(world.redis, settings)
        GarbageCollector(world.store, objects, limits, Tags(world.redis), settings).collect()
        check_jobs(world, storm, objects, unbroken_weights(settings))
        assert objects.list("checkpoints") == []
        assert world.redis.scard("nibble:active:default") == 0
        # The lease of an attempt that was killed after its last word runs out by itself.
        wait_until(lambda: world.redis.keys("nibble:lease:*") == [])
        assert list((world.state / "work").iterdir()) == []
        print(storm.summary())  # noqa: T201  # shown by `make faults`
    wait_until(lambda: processes_with(str(world.state)) == [])
