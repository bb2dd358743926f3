"""The job record and the one table of its state changes."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum

from pydantic import ConfigDict, Field

from app.core.errors import Conflict, NibbleError
from app.core.records.specs import JobSpec, Kept


class JobState(StrEnum):
    QUEUED = "queued"  # recorded, waiting for a worker
    RUNNING = "running"  # a worker holds its lease
    CANCELLING = "cancelling"  # its worker was asked to stop
    SUCCEEDED = "succeeded"  # its artifacts are published
    FAILED = "failed"  # it ended with an error
    CANCELLED = "cancelled"  # its owner stopped it


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}),
    # Back to queued: its worker was lost, and another attempt is allowed.
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.CANCELLING, JobState.SUCCEEDED, JobState.FAILED}),
    # Succeeded: the commit point was passed before the request to stop arrived.
    JobState.CANCELLING: frozenset({JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED}),
    **{state: frozenset() for state in TERMINAL},
}


class Stage(StrEnum):
    FETCHING = "fetching"
    CALIBRATING = "calibrating"
    SEARCHING = "searching"
    PACKING = "packing"
    VERIFYING = "verifying"
    EVALUATING = "evaluating"
    PUBLISHING = "publishing"


class ResourceUse(Kept):
    """What a job's process uses since its start: samples every `every_s` seconds, the newest last.

    Of a longer time each sample is the peak of memory and the mean of use. Memory and cores are of the
    process and what it started; `gpu_memory_bytes` is of all processes on the device.
    """

    began_at: datetime
    every_s: float
    memory_bytes: tuple[int, ...]
    cpu_cores: tuple[float, ...]  # in use on average: 1.5 is one and a half
    gpu_memory_bytes: tuple[int, ...] = ()  # empty without a GPU, as gpu_share is
    gpu_share: tuple[float, ...] = ()  # of the time, 0..1, in which the device was busy


class Progress(Kept):
    """Progress of the whole job: `fraction` in 0..1 never decreases within an attempt."""

    fraction: float = Field(default=0.0, ge=0, le=1)
    layer: int | None = None  # finished decoder layers
    layers: int | None = None
    eta_s: float | None = None  # seconds to the end, once enough was seen to tell
    use: ResourceUse | None = None  # while its process runs; in no list, and gone once the job has ended

    @property
    def brief(self) -> Progress:
        """Without what a list does not show."""
        return self.model_copy(update={"use": None})

    def completed(self) -> Progress:
        """The progress of a succeeded job: all layers, if their number is known."""
        return Progress(fraction=1.0, layer=self.layers, layers=self.layers)


class Problem(Kept):
    """Why a job ended without a result."""

    code: str
    message: str
    remedy: str = ""

    @classmethod
    def of(cls, error: NibbleError) -> Problem:
        return cls(code=error.code, message=error.message, remedy=error.remedy)


NEAR = 1.01  # times the original's perplexity: of what is within, the smallest is the best


class ResultFigures(Kept):
    """What a list shows of a job's result: one artifact (see figures_of); None: not evaluated."""

    label: str | None = None  # of its recipe
    bytes: int  # of all its files
    perplexity_ratio: float | None = None  # to the original's
    beyond_noise: bool | None = None  # whether the interval of that ratio leaves out 1
    kl: float | None = None  # nats per token


class Job(Kept):
    """The record of a job, as kept in Redis. `attempt` counts executions and fences stale ones."""

    # Each change writes the whole record: fields of a newer version must survive that.
    model_config = ConfigDict(extra="allow")

    id: str
    tenant: str
    spec: JobSpec
    choices: tuple[str, ...] = ()  # of the service, where the body left something open, in words
    state: JobState = JobState.QUEUED
    stage: Stage | None = None
    progress: Progress = Progress()
    attempt: int = 0
    worker: str | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    error: Problem | None = None
    artifacts: tuple[str, ...] = ()
    figures: ResultFigures | None = None  # None also in records of earlier versions
    retry_of: str | None = None
    request_id: str | None = None  # of the request that made it, for the logs
    traceparent: str | None = None  # the span of that request
    fingerprint: str | None = None  # of its contents, as seen at submission
    contents: str | None = None  # the same of the files themselves, once a worker has read them
    reused_from: str | None = None  # the job that made its artifacts
    has_hub_token: bool = False  # it was sent with one, which the record does not hold

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def has_no_result(self) -> bool:
        """Whether it has ended without a result, so that none of its artifacts may be visible."""
        return self.is_terminal and self.state is not JobState.SUCCEEDED

    @property
    def may_need_checkpoints(self) -> bool:
        """Whether a later attempt, or a retry of the failed job, may resume from its layers."""
        return self.state not in (JobState.SUCCEEDED, JobState.CANCELLED)


def transition(job: Job, to: JobState, **changes: object) -> Job:
    """The job in state `to` with `changes` applied.

    Raises Conflict if the table does not allow the step.
    """
    if to not in TRANSITIONS[job.state]:
        raise Conflict(
            f"job {job.id} is {job.state} and cannot become {to}",
            code="invalid_transition",
            remedy="read the job again: its state has changed since you looked",
        )
    if to in TERMINAL:
        changes.setdefault("finished_at", datetime.now(UTC))
        changes.setdefault("progress", job.progress.brief)
    return job.model_copy(update={"state": to, **changes})
