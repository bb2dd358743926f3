"""An artifact on its way to the hub."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from app.core.records.job import Problem
from app.core.records.specs import Kept, PushOptions


class PushState(StrEnum):
    PENDING = "pending"  # due, or waiting after a fault
    PUSHING = "pushing"  # a process sends files
    PUSHED = "pushed"
    FAILED = "failed"


ENDED_PUSHES = frozenset({PushState.PUSHED, PushState.FAILED})


class Push(Kept):
    """The record of a push, as kept in Redis. `attempt` counts who took it up, and fences stale ones."""

    id: str
    tenant: str
    artifact: str
    job: str  # that made the artifact
    options: PushOptions
    has_hub_token: bool  # one that its caller sent, which the record does not hold
    created_at: datetime
    finished_at: datetime | None = None
    state: PushState = PushState.PENDING
    attempt: int = 0
    faults: int = 0  # of the hub or the storage, after each of which it goes on
    sent_bytes: int = Field(default=0, ge=0)  # in this attempt; what the hub has already is not sent
    url: str | None = None  # of the repository
    commit: str | None = None
    commit_url: str | None = None
    error: Problem | None = None  # why it failed, or why it waits

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED_PUSHES
