"""The names under which Redis holds jobs, and of stamps.

nibble:job:<id>          hash: record (JSON without the spec), spec (JSON, never rewritten), version, change,
                         once:<name> of each event that is appended once
nibble:jobs:<tenant>     sorted set of ids, score 0: ULIDs sort by time
nibble:state:<state>     set of ids, for the janitor and the metrics
nibble:active:<tenant>   set of ids of jobs that have not ended, for the quota
nibble:ended             set of ids of jobs that have ended while what follows from it is not done (outcome)
nibble:turns:<tenant>    set of ids of jobs that are queued or run (turns)
nibble:line:<tenant>     sorted set of ids of jobs that wait for a turn, by priority
nibble:lines             set of tenants one of whose jobs has waited in line
nibble:events:<id>       stream of events, capped
nibble:postponed:<id>    there while a job waits after a fault, before it is queued again
nibble:lease:<id>        the attempt that a worker executes, with an expiry
nibble:changes           channel: the id of each job that changed

Stamps (app/core/changes/stamps.py) change with every change of what they stand for:
nibble:stamp:jobs:<tenant>    the tenant's jobs: one was recorded, changed or deleted
nibble:stamp:deployments      any deployment or replica
nibble:stamp:workers          any worker
"""

from __future__ import annotations

from app.core.records.job import JobState

JOB_PREFIX = "nibble:job:"
DEPLOYMENTS = "nibble:stamp:deployments"
WORKERS = "nibble:stamp:workers"
CHANGES = "nibble:changes"
ENDED = "nibble:ended"
LINES = "nibble:lines"


def jobs_stamp(tenant: str) -> str:
    return f"nibble:stamp:jobs:{tenant}"


def job_key(job_id: str) -> str:
    return f"{JOB_PREFIX}{job_id}"


def tenant_key(tenant: str) -> str:
    return f"nibble:jobs:{tenant}"


def state_key(state: JobState) -> str:
    return f"nibble:state:{state}"


def active_key(tenant: str) -> str:
    return f"nibble:active:{tenant}"


def turns_key(tenant: str) -> str:
    return f"nibble:turns:{tenant}"


def line_key(tenant: str) -> str:
    return f"nibble:line:{tenant}"


def tenant_keys(tenant: str) -> list[str]:
    return [active_key(tenant), jobs_stamp(tenant), turns_key(tenant), line_key(tenant)]


def events_key(job_id: str) -> str:
    return f"nibble:events:{job_id}"


def lease_key(job_id: str) -> str:
    return f"nibble:lease:{job_id}"


def postponed_key(job_id: str) -> str:
    return f"nibble:postponed:{job_id}"
