"""Jobs of the past, recorded without being run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from app.core.jobs.job_store import JobStore
from app.core.records.ids import new_id
from app.core.records.job import Job, JobState, Problem, transition
from app.core.records.specs import JobSpec


def fill(store: JobStore, count: int) -> None:
    """Jobs as a team leaves them: most have succeeded, some failed."""
    start = datetime.now(UTC) - timedelta(minutes=count)
    models = itertools.cycle(
        ["hf:Qwen/Qwen3-0.6B", "hf:meta-llama/Llama-3.1-8B-Instruct", "s3://models/ours/v7"]
    )
    for index in range(count):
        spec = JobSpec.model_validate({
            "model": next(models), "recipe": {"method": "awq", "bits": 3 + index % 2, "rounding": "gptq"},
            "labels": {"team": ("search", "platform")[index % 2], "run": str(index)},
        })  # fmt: skip
        record(store, spec, start + timedelta(minutes=index), ended(index))


def record(store: JobStore, spec: JobSpec, created: datetime, end: Callable[[Job], Job]) -> str:
    """A job that has run and ended; its id."""
    job = Job(id=new_id("job"), tenant="default", spec=spec, created_at=created, started_at=created)
    store.create(job)
    store.update(job.id, lambda job: transition(job, JobState.RUNNING))
    store.update(job.id, end)
    return job.id


def ended(index: int) -> Callable[[Job], Job]:
    if index % 9:
        return lambda job: transition(job, JobState.SUCCEEDED)
    error = Problem(code="out_of_memory", message="it needs 18.2 GB, the device has 16.0 GB", remedy="…")
    return lambda job: transition(job, JobState.FAILED, error=error)
