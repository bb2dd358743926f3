"""The engine's own work, killed half way and resumed: the same bytes as an unbroken run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from redis import Redis
from safetensors.torch import save_file

from app.core.jobs.report import Report
from app.core.records.job import Job, JobState
from app.core.records.specs import CalibrationSpec, EvaluationSpec, JobSpec, Recipe, SearchSpec
from app.core.storage.storage_keys import report_key
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


def unbroken_and_resumed(workshop: Workshop, spec: JobSpec, enough: Callable[[int], int]) -> tuple[Job, Job]:
    """A job that ran through, and the same one, killed and resumed; `enough` gets the first's checkpoints."""
    unbroken, broken = workshop.record(spec), workshop.record(spec)
    main = ("-m", "workers.main", "--device", "cpu", "--name")
    with workshop.worker("first", *main, "first"):
        assert workshop.queue.enqueue(unbroken)
        wait_until(lambda: workshop.store.load(unbroken.id).is_terminal, limit_s=240)
    layers = enough(finished_layers(workshop, unbroken))
    with workshop.worker("second", *main, "second") as second:
        assert workshop.queue.enqueue(broken)
        wait_until(lambda: finished_layers(workshop, broken) >= layers, limit_s=240)
        os.killpg(second.pid, signal.SIGKILL)
        second.wait()
    wait_until(lambda: not processes_with(str(workshop.settings.state_dir)))
    assert workshop.store.load(broken.id).state is JobState.RUNNING
    wait_until(lambda: not workshop.store.holds(broken.id, 1))
    workshop.sweep()
    with workshop.worker("third", *main, "third"):
        wait_until(lambda: workshop.store.load(broken.id).is_terminal, limit_s=240)
    resumed = workshop.store.load(broken.id)
    assert (resumed.state, resumed.attempt) == (JobState.SUCCEEDED, 2), resumed.error
    assert "resumed" in workshop.kinds(broken)
    return unbroken, resumed


def test_a_killed_job_is_resumed_to_the_same_bytes(workshop: Workshop, example_model: Path) -> None:
    spec = JobSpec(model=example_model.as_uri(), **SPEC)
    unbroken, resumed = unbroken_and_resumed(workshop, spec, lambda whole: whole // 2)
    files = published(workshop, resumed)
    assert set(files) == {"awq", "compressed-tensors"}
    assert files == published(workshop, workshop.store.load(unbroken.id))


def save_layers(folder: Path, count: int) -> None:
    """A checkpoint of a type that nobody has, each layer large enough for a shard of its own below."""
    folder.mkdir(parents=True)
    draws = torch.Generator().manual_seed(0)
    for layer in range(count):
        weight = torch.randn(LAYER_ROWS, 4096, generator=draws).to(torch.bfloat16)
        save_file({f"blocks.{layer}.fc.weight": weight}, folder / f"model-{layer:02d}.safetensors")
    config = {"model_type": "nobody_has_this", "architectures": ["NobodyModel"], "num_hidden_layers": count}
    (folder / "config.json").write_text(json.dumps(config))


LAYERS = 12
LAYER_ROWS = 8192  # of 4096 weights of a byte: 32 MiB
SHARD_BYTES = 40 * 2**20


def test_a_killed_job_without_evaluation_is_resumed_to_the_same_bytes(
    redis: Redis, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIBBLE_SHARD_BYTES", str(SHARD_BYTES))  # of the workers
    save_layers(tmp_path / "models" / "unknown", LAYERS)
    workshop = Workshop(redis, redis_url, tmp_path / "state", model_roots=(tmp_path / "models",))
    spec = JobSpec.model_validate({
        "model": (tmp_path / "models" / "unknown").as_uri(), "recipe": {"method": "rtn", "scheme": "fp8"},
        "evaluation": None, "force": True,
    })  # fmt: skip
    unbroken, resumed = unbroken_and_resumed(workshop, spec, lambda _: 4)
    files = published(workshop, resumed)["compressed-tensors"]
    assert len([name for name in files if name.endswith(".safetensors")]) == LAYERS
    assert files == published(workshop, workshop.store.load(unbroken.id))["compressed-tensors"]
    whole, again = (
        Report.model_validate_json(workshop.objects.get(report_key(job.id))) for job in (unbroken, resumed)
    )
    assert 1 <= again.environment["restored_files"] < LAYERS
    assert again.candidates[0].linears == whole.candidates[0].linears
