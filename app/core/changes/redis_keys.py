"""The names of all keys in Redis, except RQ's own (`rq:`).

`named("job")` builds `nibble:job:<id>`: the owner comes last: an id, a tenant or a digest.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256


def named(kind: str) -> Callable[[str], str]:
    """A function from an owner to the key of this kind."""
    prefix = f"nibble:{kind}:"
    return lambda owner: prefix + owner


def named_by_digest(kind: str) -> Callable[[str], str]:
    """As `named`, for secret owners: the key holds their SHA-256."""
    return lambda secret: f"nibble:{kind}:{digest(secret)}"


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


# Jobs.
JOB_PREFIX = "nibble:job:"
JOB_CHANGES = "nibble:changes"  # channel: the id of each job that changed
ENDED = "nibble:ended"  # set of ids of jobs that have ended and are not followed up yet (outcome)
LINES = "nibble:lines"  # set of tenants with a job in line or queue
# Hash: record (JSON without the spec), spec (JSON, never rewritten), version, change, once:<name> of each
# event that is appended once.
job_key = named("job")
jobs_key = named("jobs")  # by tenant: sorted set of ids, score 0, as ULIDs sort by time
state_key = named("state")  # by state: set of ids, for the janitor and the metrics
LABELLED = (
    "nibble:labelled"  # hash: by tenant, how many of its jobs are in the sets of their labels (label_index)
)
active_key = named("active")  # by tenant: set of ids of jobs that have not ended, for the quota
turns_key = named("turns")  # by tenant: set of ids of jobs that are queued or run (turns)
# By tenant: sorted set of ids of jobs that wait, by priority: those in line, then those in the queue (turns).
line_key = named("line")
events_key = named("events")  # by job: stream of events, capped
postponed_key = named("postponed")  # by job: there while it waits after a fault, before it is queued again
duty_key = named("duty")  # by name: the API process that does it for all, with an expiry (upkeep/duty)
lease_key = named("lease")  # by job: the attempt that a worker executes, with an expiry


def label_key(tenant: str, label: str) -> str:
    """Sorted set of the ids of the tenant's jobs with this `key=value`, score 0, as of all its jobs."""
    return f"nibble:label:{tenant}:{label}"


def result_key(tenant: str, fingerprint: str) -> str:
    """{job, artifacts}, for 90 days."""
    return f"nibble:made:{tenant}:{fingerprint}"


# Stamps, which change with the records that they stand for (app/core/changes/stamps.py).
DEPLOYMENTS_STAMP = "nibble:stamp:deployments"  # any deployment or replica
WORKERS_STAMP = "nibble:stamp:workers"  # any worker
jobs_stamp = named("stamp:jobs")  # by tenant: one of its jobs was recorded, changed or deleted

# Deployments.
DEPLOYMENTS = "nibble:deployments"  # set of ids
DEPLOYMENT_CHANGES = "nibble:deployment-changes"  # channel: the id of each deployment that changed
deployment_key = named("deployment")  # hash: record (JSON), version
deployment_names_key = named("deployment-names")  # by tenant: hash from name to id
deployment_used_key = named("deployment-used")  # what is left of its expiry says when it was used last


def slot_key(deployment_id: str, slot: int) -> str:
    """The replica that holds the slot, as JSON, with an expiry."""
    return f"nibble:replica:{deployment_id}:{slot}"


# Artifacts: what their manifests, which never change, can't hold.
PUSHES_DUE = "nibble:pushes:due"  # sorted set of pushes by the time at which one is to be taken up
push_key = named("push")  # the push, as JSON
pushes_key = named("pushes")  # by artifact: sorted set of its pushes
hub_token_key = named("hub-token")  # by job or push: its hub token, encrypted, until it has ended
tags_key = named("tags")  # by tenant: hash from `<model>@<tag>` to the artifact that it points to

# Workers, and what they count.
WORKERS = "nibble:workers"  # sorted set of names by the time at which they count as dead
STAGES = "nibble:tally:stages"  # hash: `<stage>:count` and `<stage>:seconds`
FAILURES = "nibble:tally:failures"  # hash: failed jobs by code
worker_key = named("worker")  # by name: the worker's record as JSON, with an expiry

# Webhooks.
DUE = "nibble:webhooks:due"  # sorted set of messages by the time of their next try
delivery_key = named("delivery")  # by message: the message and its tries, as JSON
deliveries_key = named("deliveries")  # by job: sorted set of its messages
tenant_deliveries_key = named("webhooks:of")  # by tenant: sorted set of its newest messages, capped
webhook_secret_key = named("webhook-secret")  # by tenant: hash: current; with `:previous`, the one before

# Tenants and callers.
limits_key = named("limits")  # by tenant: the operator's limits, as JSON; else those of the settings hold
COUNTED = "nibble:artifacts-counted"  # there once `usage` has every artifact (garbage); lost with the rest
usage_key = named("usage")  # by tenant: hash: bytes by artifact
rate_key = named("rate")  # by tenant: when the next request would be in time (generic cell rate algorithm)
login_key = named_by_digest("login")  # by code: id of the API key, until the link is opened
login_used_key = named_by_digest("login-used")  # the same, from then on until the link is opened again
session_key = named_by_digest("session")  # by cookie: id of the API key, for twelve hours
spent_key = named("idempotency-spent")  # by id: what an idempotency key stood for was deleted, for a day


def idempotency_key(tenant: str, key: str) -> str:
    """{body, job} of the first request with this key, for a day."""
    return f"nibble:idempotency:{tenant}:{digest(key)}"
