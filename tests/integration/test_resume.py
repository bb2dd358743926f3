"""The engine's own work, killed half way and resumed: the same bytes as an unbroken run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from redis import Redis

from app.core.records.job import Job, JobState
from app.core.records.specs import CalibrationSpec, EvaluationSpec, JobSpec, Recipe, SearchSpec
from tests.integration.workshop import Workshop, processes_with
from tests.tiny_models import some_text
from tests.waiting import wait_until


@pytest.fixture
def workshop(redis: Redis, redis_url: str, tmp_path: Path) -> Workshop:
    return Workshop(redis, redis_url, tmp_path / "state")


SPEC = {
    "recipe": Recipe(search=SearchSpec(grid_points=4)),
    "calibration": CalibrationSpec(texts=(some_text("valid"),), num_samples=8, sequence_length=128),
    "evaluation": EvaluationSpec(texts=(some_text("test"),), num_samples=4),
    "formats": ("awq", "compressed-tensors"),
    "force": True,
}


def published(workshop: Workshop, job: Job) -> dict[str, dict[str, str]]:
    """SHA-256 of each file, by format."""
    manifests = [workshop.manifest(job, name) for name in job.spec.formats]
    return {
        manifest.format: {file.path: file.sha256 for file in manifest.files}
        for manifest in manifests
        if manifest is not None
    }


def finished_layers(workshop: Workshop, job: Job) -> int:
    events = workshop.store.events(job.id, limit=1000)
    return len({event.payload["key"] for event in events if event.kind == "checkpoint"})


def test_a_killed_job_is_resumed_to_the_same_bytes(workshop: Workshop, example_model: Path) -> None:
    spec = JobSpec(model=example_model.as_uri(), **SPEC)
    unbroken, broken = workshop.record(spec), workshop.record(spec)
    main = ("-m", "workers.main", "--device", "cpu", "--name")
    with workshop.worker("first", *main, "first"):
        assert workshop.queue.enqueue(unbroken)
        wait_until(lambda: workshop.store.load(unbroken.id).is_terminal, limit_s=240)
    whole = finished_layers(workshop, unbroken)
    with workshop.worker("second", *main, "second") as second:
        assert workshop.queue.enqueue(broken)
        wait_until(lambda: finished_layers(workshop, broken) >= whole // 2, limit_s=240)
        os.killpg(second.pid, signal.SIGKILL)
        second.wait()
    wait_until(lambda: not processes_with(str(workshop.settings.state_dir)))
    assert workshop.store.load(broken.id).state is JobState.RUNNING
    wait_until(lambda: not workshop.store.holds(broken.id, 1))
    workshop.sweep()
    with workshop.worker("third", *main, "third"):
        wait_until(lambda: workshop.store.load(broken.id).is_terminal, limit_s=240)
    resumed = workshop.store.load(broken.id)
    assert (resumed.state, resumed.attempt) == (JobState.SUCCEEDED, 2)
    assert "resumed" in workshop.kinds(broken)
    files = published(workshop, resumed)
    assert set(files) == {"awq", "compressed-tensors"}
    assert files == published(workshop, workshop.store.load(unbroken.id))
