"""The report of a job that ended without a result: what it did until then, by its record and events."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from pydantic import Field, ValidationError

from app.core.child.assignment import PREDICTION
from app.core.jobs.job_store import JobEvent
from app.core.planning.cost_model import Prediction
from app.core.records.job import Job, JobState, Problem, Stage
from app.core.records.specs import Frozen


class UnfinishedReport(Frozen):
    """What is known of a failed or cancelled job; `complete` tells it from a quality report.

    A job that never started has no stage, layers or prediction.
    """

    version: int = 1
    complete: Literal[False] = False
    job: str
    state: JobState
    error: Problem | None
    model: str
    recipes: tuple[str, ...]  # their labels
    attempts: int
    worker: str | None  # of the last attempt
    stage: Stage | None  # in which it ended
    finished_layers: int | None
    layers: int | None
    checkpoints: int  # files in storage that the attempts wrote; a retry of a failed job goes on after them
    waited_s: float  # for workers, all attempts together
    stages: dict[Stage, float] = Field(description="wall seconds per stage of all attempts, from the events")
    prediction: Prediction | None  # made by the last attempt before its work
    peak_rss_bytes: int | None = None  # seen every two seconds, of an attempt whose process crashed
    notes: tuple[str, ...]
    output: str | None  # the last lines of the process, if it crashed


def unfinished_report(job: Job, events: Sequence[JobEvent]) -> UnfinishedReport:
    """`events` are all that there are, oldest first."""
    stages, waited_s = spent_seconds(events)
    payloads = [event.payload for event in events if event.kind == "state"]
    failures = [event.payload for event in events if event.kind == "failure"]
    progress = [*[(each.get("layer"), each.get("layers")) for each in payloads],
                (job.progress.layer, job.progress.layers)]  # fmt: skip
    reached = [each for each in progress if each[0] is not None]
    finished_layers, layers = max(reached, default=(None, None))
    return UnfinishedReport(
        job=job.id,
        state=job.state,
        error=job.error,
        model=job.spec.model,
        recipes=tuple(recipe.label for recipe in job.spec.recipes),
        attempts=job.attempt,
        worker=job.worker,
        stage=next(
            (Stage(event.payload["stage"]) for event in reversed(events) if event.kind == "stage"), None
        ),
        finished_layers=finished_layers,
        layers=layers,
        checkpoints=len({event.payload.get("key") for event in events if event.kind == "checkpoint"}),
        waited_s=waited_s,
        stages=stages,
        prediction=prediction_of(events),
        peak_rss_bytes=failures[-1].get("peak_rss_bytes") if failures else None,
        notes=notes_of(events),
        output=failures[-1].get("output") if failures else None,
    )


def spent_seconds(events: Sequence[JobEvent]) -> tuple[dict[Stage, float], float]:
    """Seconds of each stage, and of waiting in queues: each lasts until the next event that ends it."""
    stages: dict[Stage, float] = defaultdict(float)
    waited_s = 0.0
    since: datetime | None = None  # when what goes on now began
    current: Stage | JobState | None = None
    for event in events:
        if event.kind not in ("state", "stage"):
            continue
        seconds = (event.created_at - since).total_seconds() if since is not None else 0.0
        if isinstance(current, Stage):
            stages[current] += seconds
        elif current is JobState.QUEUED:
            waited_s += seconds
        since = event.created_at
        if event.kind == "stage":
            current = Stage(event.payload["stage"])
        elif event.payload["state"] != JobState.CANCELLING:  # the stage goes on until the process has stopped
            current = JobState(event.payload["state"])
    return {stage: round(seconds, 3) for stage, seconds in stages.items()}, round(waited_s, 3)


def prediction_of(events: Sequence[JobEvent]) -> Prediction | None:
    """The last attempt's; None if no attempt came that far, or one of another version made it."""
    for event in reversed(events):
        if event.kind == "note" and event.payload.get("code") == PREDICTION:
            try:
                return Prediction.model_validate(event.payload["detail"])
            except (KeyError, ValidationError):
                return None
    return None


def notes_of(events: Sequence[JobEvent]) -> tuple[str, ...]:
    """Notes and repeated attempts in words, each once."""
    notes = []
    if events and (events[0].kind, events[0].payload.get("state")) != ("state", JobState.QUEUED):
        since = events[0].created_at.isoformat(timespec="seconds")
        notes.append(f"the oldest events are gone: seconds, checkpoints and notes are those since {since}")
    for event in events:
        payload = event.payload
        if event.kind == "note" and payload.get("code") != PREDICTION and payload.get("message"):
            notes.append(str(payload["message"]))
        elif event.kind == "retry":
            pause = f"again after {payload['pause_s']:g} s" if "pause_s" in payload else "again"
            notes.append(f"attempt {payload.get('attempt')} failed, {pause}: {payload.get('message')}")
    return tuple(dict.fromkeys(notes))
