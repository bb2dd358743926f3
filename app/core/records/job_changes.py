"""The changes of state that more than one process makes, as functions from job to job."""

from __future__ import annotations

from datetime import UTC, datetime

from app.core.errors import Conflict, DeadlineExceeded, NibbleError
from app.core.records.job import Job, JobState, Problem, Progress, transition


def stale(job: Job, attempt: int) -> Conflict:
    return Conflict(
        f"job {job.id} is {job.state} in attempt {job.attempt}; attempt {attempt} may not change it",
        code="stale_attempt",
        remedy="stop this attempt: another one has taken its place, or the job has ended",
    )


def is_executing(job: Job, attempt: int) -> bool:
    """Whether `attempt` may write to the record."""
    return job.attempt == attempt and job.state in (JobState.RUNNING, JobState.CANCELLING)


def claimed(job: Job, attempt: int, worker: str) -> Job:
    """The job running on `worker`. Raises Conflict unless `attempt` is its next one."""
    if job.attempt + 1 != attempt or job.state is not JobState.QUEUED:
        raise stale(job, attempt)
    started = job.started_at or datetime.now(UTC)
    return transition(job, JobState.RUNNING, attempt=attempt, worker=worker, started_at=started)


def requeued(job: Job) -> Job:
    """The job back in its queue, after the worker of its attempt was lost."""
    return transition(job, JobState.QUEUED, stage=None, progress=Progress(), worker=None)


def overdue(job: Job) -> Job:
    """The job failed because no worker started it in time; unchanged if one did."""
    if job.state is not JobState.QUEUED or job.attempt > 0:
        return job
    return failed(
        job,
        DeadlineExceeded(
            f"it waited longer than {job.spec.queue_timeout_s} s for a worker",
            code="queue_deadline_exceeded",
            remedy="submit it again with a larger queue_timeout_s (nibble submit --queue-timeout), or have "
            "workers started; GET /v1/workers lists those that live",
        ),
    )


def failed(job: Job, error: NibbleError) -> Job:
    return transition(job, JobState.FAILED, error=Problem.of(error))


def cancel_requested(job: Job) -> Job:
    """The job after its owner's request to cancel: cancelled if it waits, else cancelling.

    A repeated request changes nothing. Raises Conflict if the job has ended otherwise.
    """
    if job.state is JobState.QUEUED:
        return transition(job, JobState.CANCELLED)
    if job.state is JobState.RUNNING:
        return transition(job, JobState.CANCELLING)
    if job.state in (JobState.CANCELLING, JobState.CANCELLED):
        return job
    raise Conflict(
        f"job {job.id} has {job.state} already",
        code="job_finished",
        remedy="nothing is left to cancel",
    )
