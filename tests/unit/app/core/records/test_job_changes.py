from __future__ import annotations

from datetime import UTC, datetime

import pytest

from app.core.errors import Conflict, WorkerLost
from app.core.records.ids import new_id
from app.core.records.job import Job, JobState, Progress, Stage
from app.core.records.job_changes import cancel_requested, claimed, failed, is_executing, requeued
from app.core.records.specs import JobSpec


def job_in(state: JobState, attempt: int = 0) -> Job:
    return Job(
        id=new_id("job"),
        tenant="t",
        spec=JobSpec(model="org/name"),
        state=state,
        attempt=attempt,
        created_at=datetime.now(UTC),
    )


def test_a_claim_begins_the_next_attempt() -> None:
    job = claimed(job_in(JobState.QUEUED, attempt=1), 2, "w")
    assert (job.state, job.attempt, job.worker) == (JobState.RUNNING, 2, "w")
    assert job.started_at is not None


@pytest.mark.parametrize("attempt", [1, 3])
def test_only_the_next_attempt_can_be_claimed(attempt: int) -> None:
    with pytest.raises(Conflict) as refusal:
        claimed(job_in(JobState.QUEUED, attempt=1), attempt, "w")
    assert refusal.value.code == "stale_attempt"


def test_a_lost_job_starts_from_the_beginning_of_its_stages() -> None:
    running = job_in(JobState.RUNNING, attempt=1).model_copy(
        update={"stage": Stage.SEARCHING, "progress": Progress(fraction=0.5), "worker": "w"}
    )
    job = requeued(running)
    assert (job.state, job.stage, job.progress.fraction, job.worker) == (JobState.QUEUED, None, 0.0, None)
    assert job.attempt == 1


def test_a_failed_job_says_why_and_when() -> None:
    job = failed(job_in(JobState.RUNNING), WorkerLost("gone", remedy="look"))
    assert job.error is not None
    assert (job.error.code, job.error.remedy) == ("worker_lost", "look")
    assert job.finished_at is not None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (JobState.QUEUED, JobState.CANCELLED),
        (JobState.RUNNING, JobState.CANCELLING),
        (JobState.CANCELLING, JobState.CANCELLING),
        (JobState.CANCELLED, JobState.CANCELLED),
    ],
)
def test_cancel_stops_at_once_or_asks(before: JobState, after: JobState) -> None:
    assert cancel_requested(job_in(before)).state is after


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
def test_a_job_that_ended_cannot_be_cancelled(state: JobState) -> None:
    with pytest.raises(Conflict) as refusal:
        cancel_requested(job_in(state))
    assert refusal.value.code == "job_finished"


@pytest.mark.parametrize("state", list(JobState))
def test_only_the_living_attempt_may_write(state: JobState) -> None:
    job = job_in(state, attempt=2)
    assert is_executing(job, 2) is (state in (JobState.RUNNING, JobState.CANCELLING))
    assert not is_executing(job, 1)
