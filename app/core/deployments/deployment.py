"""Deployments: the record, its replicas, and the state that follows from both.

The record holds what its owner wants (`goal`) and why it can't be had (`error`). The replicas say what they
do, under a lease. The state that callers see is computed, so no process can leave a wrong one behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated

from app.core.records.forms import Form
from app.core.records.ids import ARTIFACT_ID_PATTERN
from app.core.records.job import Problem
from app.core.records.specs import DeploymentOptions, Frozen, Kept

ArtifactId = Annotated[
    str,
    Form(
        ARTIFACT_ID_PATTERN,
        "an artifact's id (art_ and 26 letters and digits); `nibble artifacts`, GET /v1/artifacts list yours",
    ),
]


class DeploymentSpec(DeploymentOptions):
    """The body of `POST /v1/deployments`."""

    artifact: ArtifactId


class Goal(StrEnum):
    SERVE = "serve"  # its servers run
    REST = "rest"  # idle: its servers stop, the next request sets SERVE again
    REMOVE = "remove"  # deleted: its servers stop, then the record goes


class DeploymentState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class Deployment(Kept):
    """The record, as kept in Redis."""

    id: str
    tenant: str
    spec: DeploymentSpec
    created_at: datetime
    goal: Goal = Goal.SERVE
    error: Problem | None = None  # why no server can run
    job: str | None = None  # that requested it
    load_s: float | None = None  # how long the last start took
    setback: str = ""  # the last failure of a replica while others served

    @property
    def wants_servers(self) -> bool:
        return self.goal is Goal.SERVE and self.error is None


class ReplicaState(StrEnum):
    FETCHING = "fetching"  # the artifact's files come to the host
    LOADING = "loading"  # the server reads the model
    READY = "ready"
    RESTARTING = "restarting"  # the server has ended by itself
    DRAINING = "draining"  # it finishes what it has begun


class Replica(Kept):
    """One server of a deployment, as its worker describes it with each heartbeat."""

    deployment: str
    slot: int
    owner: str  # the worker process that holds the slot
    worker: str
    engine: str
    state: ReplicaState = ReplicaState.FETCHING
    url: str | None = None  # when it answers
    running: int = 0
    waiting: int = 0
    restarts: int = 0
    note: str = ""
    max_model_len: int | None = None
    since: datetime

    @property
    def is_ready(self) -> bool:
        return self.state is ReplicaState.READY and self.url is not None


class LiveDeployment(Frozen):
    """A deployment and its replicas with a live lease."""

    deployment: Deployment
    replicas: tuple[Replica, ...] = ()

    @property
    def id(self) -> str:
        return self.deployment.id

    @property
    def spec(self) -> DeploymentSpec:
        return self.deployment.spec

    @property
    def ready(self) -> tuple[Replica, ...]:
        return tuple(replica for replica in self.replicas if replica.is_ready)

    @property
    def state(self) -> DeploymentState:
        if self.deployment.goal is Goal.REMOVE:
            return DeploymentState.DRAINING
        if self.deployment.error is not None:
            return DeploymentState.FAILED
        if self.deployment.goal is Goal.REST:
            return DeploymentState.DRAINING if self.replicas else DeploymentState.STOPPED
        return DeploymentState.READY if self.ready else DeploymentState.STARTING

    def reason(self, engines: Sequence[Sequence[str]]) -> str:
        """The reason of its state; empty if all is well. `engines` are those of each worker that serves."""
        deployment, spec = self.deployment, self.spec
        if deployment.error is not None:
            return deployment.error.message
        if deployment.goal is Goal.REMOVE:
            return "deleted; running requests are finished"
        if deployment.goal is Goal.REST:
            return f"no request for {spec.idle_timeout_s} s; the next one starts it again"
        absent = spec.replicas - len(self.replicas)
        reasons = [
            f"replica {replica.slot}: {said(replica)}" for replica in self.replicas if not replica.is_ready
        ]
        if absent:
            reasons.append(f"{absent} of {spec.replicas} replicas wait: {waits_for(spec.engine, engines)}")
        if absent and deployment.setback:
            reasons.append(f"the last one that was tried failed: {deployment.setback}")
        return "; ".join(reasons)


def said(replica: Replica) -> str:
    return f"{replica.state}, {replica.note}" if replica.note else str(replica.state)


def waits_for(engine: str, engines: Sequence[Sequence[str]]) -> str:
    if not engines:
        return "no worker takes the queue `serve`"
    if engine != "auto" and not any(engine in offered for offered in engines):
        return f"no worker has {engine} installed"
    return "for a worker with a free slot"
