"""Deployments: the record, its replicas, and the state that follows from both.

The record holds what its owner wants (`goal`, `spec`) and why it can't be had (`error`). The replicas say
what they do, under a lease. The state that callers see is computed, so no process can leave a wrong one
behind.

What a server is started with (`Served`) has a number, its generation. A replacement is the next generation:
its servers start beside those of the present one, until the record names it as the present one.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field

from app.core.records.forms import Form
from app.core.records.ids import ARTIFACT_ID_PATTERN
from app.core.records.job import Problem
from app.core.records.serving_options import MOST_REPLICAS, DeploymentOptions, ServerOptions
from app.core.records.specs import Frozen, Kept
from app.core.storage.tags import TAG

ArtifactId = Annotated[
    str,
    Form(
        rf"{ARTIFACT_ID_PATTERN}|^[^@\s]{{1,1024}}@{TAG}$",
        "an artifact's id (art_ and 26 letters and digits) or model@tag; `nibble artifacts` "
        "and GET /v1/artifacts list yours",
    ),
]

Original = Annotated[
    bool,
    Field(
        description="true: serve the model that the artifact was made of, not quantized, as a baseline; with "
        "the job's adapter merged into it"
    ),
]


class Served(ServerOptions):
    """What a server is started with."""

    artifact: ArtifactId
    original: Original = False

    @property
    def subject(self) -> str:
        """What is served, in words."""
        return f"the original of {self.artifact}" if self.original else self.artifact


class DeploymentSpec(DeploymentOptions):
    """The body of `POST /v1/deployments`; a recorded one has the artifact's id."""

    artifact: ArtifactId
    original: Original = False

    @property
    def served(self) -> Served:
        return Served(**{name: getattr(self, name) for name in Served.model_fields})

    def serving(self, served: Served) -> Self:
        """The spec with other servers."""
        return self.model_copy(update={name: getattr(served, name) for name in Served.model_fields})


class Goal(StrEnum):
    SERVE = "serve"  # its servers run
    REST = "rest"  # idle: its servers stop, the next request sets SERVE again
    PAUSE = "pause"  # its owner stopped it: its servers stop until its owner sets SERVE again
    REMOVE = "remove"  # deleted: its servers stop, then the record goes


class DeploymentState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    PAUSED = "paused"
    FAILED = "failed"


class Replacement(Kept):
    """What shall serve instead of what the deployment's spec says."""

    generation: int
    served: Served
    error: Problem | None = None  # why it can't be had; the present generation goes on


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
    revision: int = 1  # one more with each change by its owner
    generation: int = 1  # of what its spec serves
    generations: int = 1  # how many were begun
    side: int = 0  # which half of the slots its generation has; a replacement has the other one
    most_replicas: int = 0  # that it had before: their slots may still be held
    replacement: Replacement | None = None

    @property
    def wants_servers(self) -> bool:
        return self.goal is Goal.SERVE and self.error is None

    @property
    def incoming(self) -> Replacement | None:
        """The replacement that is under way."""
        return None if self.replacement is None or self.replacement.error is not None else self.replacement

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may call it, and nobody else's deployment of the tenant has."""
        return () if self.goal is Goal.REMOVE else self.spec.names

    @property
    def artifacts(self) -> frozenset[str]:
        """Those that it serves or is about to."""
        incoming = self.incoming
        return frozenset({self.spec.artifact, *([] if incoming is None else [incoming.served.artifact])})

    @property
    def slots(self) -> list[int]:
        """Those that a replica may hold."""
        sides = (0, 1) if self.generations > 1 else (self.side,)
        count = max(self.most_replicas, self.spec.replicas)
        return [slot for side in sides for slot in side_slots(side, count)]

    def of_generation(self, generation: int) -> Deployment:
        """The deployment as a server of that generation needs it."""
        if self.incoming is None or self.incoming.generation != generation:
            return self
        return self.model_copy(update={"spec": self.spec.serving(self.incoming.served)})


def side_slots(side: int, count: int) -> range:
    """The slots of a generation with so many replicas."""
    return range(side * MOST_REPLICAS, side * MOST_REPLICAS + count)


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
    generation: int = 1
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
        if self.deployment.goal is Goal.PAUSE:
            return DeploymentState.PAUSED
        if self.deployment.error is not None:
            return DeploymentState.FAILED
        if self.deployment.goal is Goal.REST:
            return DeploymentState.DRAINING if self.replicas else DeploymentState.STOPPED
        return DeploymentState.READY if self.ready else DeploymentState.STARTING
