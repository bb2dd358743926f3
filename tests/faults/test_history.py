"""The checker finds what it is there to find."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from app.core.jobs.job_store import JobEvent
from app.core.records.ids import new_id
from app.core.records.job import Job, JobState
from app.core.records.specs import JobSpec
from tests.faults.history import violations

Line = tuple[str, dict[str, Any]]
QUEUED: Line = ("state", {"state": "queued", "attempt": 0})
RUNNING: Line = ("state", {"state": "running", "attempt": 1})
DONE: Line = ("state", {"state": "succeeded", "attempt": 1})
CHECKPOINT: Line = ("checkpoint", {"key": "layer-0", "attempt": 1})


def judged(*lines: Line, state: JobState = JobState.SUCCEEDED, ids: str = "") -> list[str]:
    now = datetime.now(UTC)
    job = Job(id=new_id("job"), tenant="t", spec=JobSpec(model="m"), created_at=now, state=state)
    events = [
        JobEvent(id=f"{ids[index] if ids else index + 1}-0", created_at=now, kind=kind, payload=payload)
        for index, (kind, payload) in enumerate(lines)
    ]
    return violations(job, events)


def test_a_history_in_order_is_let_be() -> None:
    assert judged(QUEUED, RUNNING, CHECKPOINT, DONE) == []
    back = ("state", {"state": "queued", "attempt": 1})
    again = ("state", {"state": "running", "attempt": 2})
    done = ("state", {"state": "succeeded", "attempt": 2})
    assert judged(QUEUED, RUNNING, back, ("note", {"attempt": 1}), again, done) == []


@pytest.mark.parametrize(
    "lines",
    [
        (QUEUED, RUNNING),
        (QUEUED, DONE),
        (RUNNING, DONE),
        (QUEUED, RUNNING, DONE, DONE),
        (QUEUED, RUNNING, DONE, CHECKPOINT),
        (QUEUED, CHECKPOINT, RUNNING, DONE),
        (QUEUED, RUNNING, ("checkpoint", {"attempt": 2}), DONE),
        (QUEUED, ("state", {"state": "running", "attempt": 2}), DONE),
    ],
)
def test_what_is_wrong_is_found(lines: tuple[Line, ...]) -> None:
    assert judged(*lines)


def test_a_record_that_differs_and_ids_out_of_order_are_found() -> None:
    assert judged(QUEUED, RUNNING, DONE, state=JobState.FAILED)
    assert judged(QUEUED, RUNNING, DONE, ids="132")
    assert judged(QUEUED, RUNNING, DONE, ids="122")
