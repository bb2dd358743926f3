"""Judges the history of a job: what may follow what, and how it must end."""

from __future__ import annotations

from collections.abc import Sequence

from app.core.jobs.job_store import JobEvent
from app.core.records.job import TERMINAL, TRANSITIONS, Job, JobState

# What only the attempt that executes the job may say.
OF_ATTEMPTS = ("stage", "checkpoint", "resumed", "failure", "retry")


def violations(job: Job, events: Sequence[JobEvent]) -> list[str]:
    """Everything that is wrong with the job's history; empty if it is in order."""
    return [*wrong_order(events), *wrong_states(events), *wrong_end(job, events)]


def wrong_order(events: Sequence[JobEvent]) -> list[str]:
    ids = [tuple(int(part) for part in event.id.split("-")) for event in events]
    return [] if ids == sorted(set(ids)) else ["event ids do not grow"]


def wrong_states(events: Sequence[JobEvent]) -> list[str]:
    found: list[str] = []
    state, attempt = None, 0
    for event in events:
        if event.kind == "state":
            after, now = JobState(event.payload["state"]), event.payload["attempt"]
            if state is None:
                found += [] if after is JobState.QUEUED else [f"it begins as {after}"]
            elif after not in TRANSITIONS[state]:
                found.append(f"{state} became {after}")
            if now != attempt + (after is JobState.RUNNING):
                found.append(f"attempt {attempt} became {now} in {after}")
            state, attempt = after, now
        elif event.kind in OF_ATTEMPTS and state not in (JobState.RUNNING, JobState.CANCELLING):
            found.append(f"{event.kind} of an attempt while it was {state}")
        elif event.kind in OF_ATTEMPTS and event.payload.get("attempt", attempt) != attempt:
            found.append(f"{event.kind} of attempt {event.payload['attempt']} in attempt {attempt}")
    return found


def wrong_end(job: Job, events: Sequence[JobEvent]) -> list[str]:
    states = [JobState(event.payload["state"]) for event in events if event.kind == "state"]
    ends = [state for state in states if state in TERMINAL]
    if len(ends) != 1 or not states or states[-1] is not ends[0]:
        return [f"it has {len(ends)} ends: {', '.join(states)}"]
    found = [] if job.state is ends[0] else [f"the record says {job.state}, the history {ends[0]}"]
    if job.state is not JobState.SUCCEEDED and job.artifacts:
        found.append(f"{job.state} with artifacts")
    if job.state is JobState.FAILED and (job.error is None or not job.error.code):
        found.append("failed without a code")
    return found
