"""Encoding of jobs for Redis, and the events of their changes."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from app.core.errors import RecordUnreadable, field_path
from app.core.records.job import Job, JobState
from app.core.records.specs import JobSpec

SHORT_SPEC = 4096  # bytes up to which a parsed spec is cached: specs with texts are longer


def decode(record: bytes, spec: bytes) -> Job:
    """The job of a record. Raises RecordUnreadable for one that only another version can read."""
    fields = json.loads(record)
    try:
        parsed = short_spec(spec) if len(spec) <= SHORT_SPEC else JobSpec.model_validate_json(spec)
        return Job.model_validate({**fields, "spec": parsed})
    except ValidationError as fault:
        where = field_path(fault.errors()[0]["loc"])
        raise RecordUnreadable(
            f"job {fields.get('id')} was recorded by another version of the service: {where}",
            remedy="finish the upgrade; processes of the newer version can read it",
        ) from fault


@lru_cache(maxsize=1024)
def short_spec(spec: bytes) -> JobSpec:
    """Specs never change, and lists show the same ones again and again."""
    return JobSpec.model_validate_json(spec)


def encode(job: Job) -> str:
    """The record as JSON; parsed again, so that no change can store what can't be read."""
    record = job.model_dump_json(exclude={"spec"})
    Job.model_validate({**json.loads(record), "spec": job.spec})
    return record


def announcement(before: Job, after: Job) -> tuple[str, str]:
    """Kind and payload of a change's event: its new state, else its new stage, else empty."""
    if before.state is not after.state:
        return "state", state_payload(after, before)
    if before.stage is not after.stage:
        return "stage", json.dumps({"stage": after.stage, "attempt": after.attempt})
    return "", ""


def state_payload(job: Job, before: Job | None = None) -> str:
    """The event of a new state, with the layers that were finished until then."""
    payload: dict[str, Any] = {"state": job.state, "attempt": job.attempt}
    if before is not None and before.progress.layer is not None:
        payload |= before.progress.model_dump(include={"layer", "layers"})
    if job.worker is not None and job.state is JobState.RUNNING:
        payload["worker"] = job.worker
    if job.error is not None:
        payload["error"] = job.error.model_dump()
    return json.dumps(payload)
