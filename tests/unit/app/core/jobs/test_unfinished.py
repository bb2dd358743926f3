"""What the events of a job tell after an end without a result."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from app.core.child.assignment import PREDICTION
from app.core.jobs.job_encoding import announcement
from app.core.jobs.job_store import JobEvent
from app.core.jobs.unfinished import UnfinishedReport, unfinished_report
from app.core.planning.cost_model import Prediction
from app.core.records.ids import new_id
from app.core.records.job import Job, JobState, Progress, Stage
from app.core.records.job_changes import requeued
from app.core.records.specs import JobSpec

START = datetime(2026, 11, 27, tzinfo=UTC)
EXPECTED = Prediction(
    basis="nominal", seconds={Stage.CALIBRATING: 9.0}, candidate_seconds=(), ram_bytes=1, vram_bytes=0,
    disk_bytes=2, output_bytes=(3,),
)  # fmt: skip


def report(*told: tuple[float, str, dict[str, Any]], **changes: object) -> UnfinishedReport:
    """Of a cancelled job with these events, each after so many seconds."""
    job = Job(
        id=new_id("job"), tenant="default", spec=JobSpec(model="a/b"), state=JobState.CANCELLED,
        created_at=START, attempt=2,
    ).model_copy(update=changes)  # fmt: skip
    events = [
        JobEvent(id=f"{number}-0", created_at=START + timedelta(seconds=after), kind=kind, payload=payload)
        for number, (after, kind, payload) in enumerate(told)
    ]
    return unfinished_report(job, events)


def test_seconds_of_stages_are_those_between_events_of_all_attempts() -> None:
    note = {"code": PREDICTION, "message": "9 s are expected", "detail": EXPECTED.model_dump(mode="json")}
    found = report(
        (0, "state", {"state": "queued", "attempt": 0}),
        (5, "state", {"state": "running", "attempt": 1}),
        (6, "stage", {"stage": "fetching"}),
        (8, "stage", {"stage": "calibrating"}),
        (9, "note", {"code": "plan", "message": "lm_head keeps its precision"}),
        (9, "checkpoint", {"key": "layer-0"}),
        (18, "retry", {"code": "child_killed", "message": "it was killed", "attempt": 1, "pause_s": 5.0}),
        (18, "state", {"state": "queued", "attempt": 1, "layer": 3, "layers": 8}),
        (25, "state", {"state": "running", "attempt": 2}),
        (25, "stage", {"stage": "calibrating"}),
        (26, "note", note),
        (27, "note", {"code": "plan", "message": "lm_head keeps its precision"}),
        (27, "checkpoint", {"key": "layer-0"}),
        (28, "stage", {"stage": "searching"}),
        (30, "state", {"state": "cancelling", "attempt": 2}),
        (31, "state", {"state": "cancelled", "attempt": 2}),
        progress=Progress(fraction=0.1, layer=2, layers=8),
    )
    assert found.stages == {"fetching": 2.0, "calibrating": 13.0, "searching": 3.0}
    assert found.waited_s == 12.0
    assert (found.stage, found.finished_layers, found.layers) == ("searching", 3, 8)
    assert (found.checkpoints, found.prediction) == (1, EXPECTED)
    again = "attempt 1 failed, again after 5 s: it was killed"
    assert found.notes == ("lm_head keeps its precision", again)


def test_a_job_that_never_ran_tells_how_long_it_waited() -> None:
    found = report(
        (0, "state", {"state": "queued", "attempt": 0}),
        (60, "state", {"state": "cancelled", "attempt": 0}),
        attempt=0,
    )
    assert (found.waited_s, found.stages, found.stage, found.prediction) == (60.0, {}, None, None)
    assert (found.notes, found.finished_layers) == ((), None)


def test_a_history_without_its_beginning_says_so() -> None:
    found = report((0, "stage", {"stage": "calibrating"}), (4, "state", {"state": "cancelled"}))
    assert found.stages == {"calibrating": 4.0}
    assert found.notes == (
        "the oldest events are gone: "
        "seconds, checkpoints and notes are those since 2026-11-27T00:00:00+00:00",
    )


def test_the_prediction_of_another_version_is_left_out() -> None:
    assert report((0, "note", {"code": PREDICTION, "message": "", "detail": {"new": 1}})).prediction is None


def test_the_event_of_a_requeued_job_names_the_layers_that_were_finished() -> None:
    running = Job(
        id=new_id("job"), tenant="default", spec=JobSpec(model="a/b"), state=JobState.RUNNING,
        created_at=START, progress=Progress(fraction=0.5, layer=3, layers=8),
    )  # fmt: skip
    kind, payload = announcement(running, requeued(running))
    assert kind == "state"
    assert '"layer": 3, "layers": 8' in payload
