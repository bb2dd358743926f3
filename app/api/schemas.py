"""The API's answers. Records of app.core are converted to these, never sent directly."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel

from app.core.deployments.deployment import DeploymentState, LiveDeployment, ReplicaState
from app.core.formats.registry import FormatName
from app.core.jobs.job_store import JobEvent, JobPage
from app.core.jobs.worker_registry import WorkerRecord
from app.core.planning.device_profile import Basis
from app.core.records.artifact import ArtifactFile, ArtifactManifest
from app.core.records.job import Job, JobState, Problem, Progress, Stage
from app.core.records.specs import Engine, JobSpec, Recipe, VllmOptions
from app.core.storage.artifact_store import ArtifactPage


class JobView(BaseModel):
    object: Literal["job"] = "job"
    id: str
    state: JobState
    stage: Stage | None
    progress: Progress
    attempt: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    spec: JobSpec
    labels: dict[str, str]
    error: Problem | None
    artifacts: tuple[str, ...]
    retry_of: str | None
    reused_from: str | None
    links: dict[str, str]

    @classmethod
    def of(cls, job: Job) -> Self:
        here = f"/v1/jobs/{job.id}"
        links = {"self": here, "events": f"{here}/events"}
        if job.is_terminal:
            links["report"] = f"{here}/report"
        links |= {"retry": f"{here}/retry"} if job.is_terminal else {"cancel": f"{here}/cancel"}
        return cls(
            id=job.id,
            state=job.state,
            stage=job.stage,
            progress=job.progress,
            attempt=job.attempt,
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
            spec=job.spec,
            labels=job.spec.labels,
            error=job.error,
            artifacts=job.artifacts,
            retry_of=job.retry_of,
            reused_from=job.reused_from,
            links=links,
        )


class BriefJobView(BaseModel):
    """A job in a list: small enough for frequent polling."""

    object: Literal["job.brief"] = "job.brief"
    id: str
    state: JobState
    stage: Stage | None
    progress: Progress
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    model: str
    recipes: tuple[str, ...]  # their labels
    labels: dict[str, str]
    error: Problem | None

    @classmethod
    def of(cls, job: Job) -> Self:
        return cls(
            id=job.id,
            state=job.state,
            stage=job.stage,
            progress=job.progress,
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
            model=job.spec.model,
            recipes=tuple(recipe.label for recipe in job.spec.recipes),
            labels=job.spec.labels,
            error=job.error,
        )


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: tuple[JobView, ...] | tuple[BriefJobView, ...]
    has_more: bool
    next: str | None  # the value of `after` for the next page

    @classmethod
    def of(cls, page: JobPage, *, brief: bool = False) -> Self:
        data: tuple[JobView, ...] | tuple[BriefJobView, ...]
        if brief:
            data = tuple(BriefJobView.of(job) for job in page.jobs)
        else:
            data = tuple(JobView.of(job) for job in page.jobs)
        return cls(data=data, has_more=page.has_more, next=page.jobs[-1].id if page.has_more else None)


class EventView(BaseModel):
    object: Literal["event"] = "event"
    id: str
    at: datetime
    kind: str
    payload: dict[str, Any]

    @classmethod
    def of(cls, event: JobEvent) -> Self:
        return cls(id=event.id, at=event.created_at, kind=event.kind, payload=event.payload)


class EventList(BaseModel):
    object: Literal["list"] = "list"
    data: tuple[EventView, ...]
    has_more: bool
    next: str | None  # the last event's id, even if there are no more events yet


class ArtifactView(BaseModel):
    object: Literal["artifact"] = "artifact"
    id: str
    job: str
    created_at: datetime
    model: str
    model_digest: str
    recipe: Recipe
    format: FormatName
    size: int
    summary: dict[str, Any]
    files: tuple[ArtifactFile, ...]
    links: dict[str, str]

    @classmethod
    def of(cls, manifest: ArtifactManifest) -> Self:
        here = f"/v1/artifacts/{manifest.id}"
        return cls(
            id=manifest.id,
            job=manifest.job,
            created_at=manifest.created_at,
            model=manifest.model,
            model_digest=manifest.model_digest,
            recipe=manifest.recipe,
            format=manifest.format,
            size=manifest.size,
            summary=manifest.summary,
            files=manifest.files,
            links={"self": here, "files": f"{here}/files", "job": f"/v1/jobs/{manifest.job}"},
        )


class ArtifactList(BaseModel):
    object: Literal["list"] = "list"
    data: tuple[ArtifactView, ...]
    has_more: bool
    next: str | None

    @classmethod
    def of(cls, page: ArtifactPage) -> Self:
        data = tuple(ArtifactView.of(manifest) for manifest in page.manifests)
        return cls(data=data, has_more=page.has_more, next=data[-1].id if page.has_more else None)


class ReplicaView(BaseModel):
    slot: int
    worker: str
    engine: str
    state: ReplicaState
    running: int
    waiting: int
    restarts: int
    note: str
    since: datetime


class DeploymentView(BaseModel):
    object: Literal["deployment"] = "deployment"
    id: str
    name: str
    artifact: str
    engine: Engine
    state: DeploymentState
    reason: str  # explains any state but ready
    error: Problem | None
    idle_timeout_s: int | None
    replicas: int  # requested
    vllm: VllmOptions | None
    servers: tuple[ReplicaView, ...]  # running or starting
    job: str | None
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, live: LiveDeployment, engines: Sequence[Sequence[str]]) -> Self:
        """`engines`: the engines of each live worker of the queue `serve`."""
        deployment, spec = live.deployment, live.spec
        links = {"self": f"/v1/deployments/{live.id}", "artifact": f"/v1/artifacts/{spec.artifact}"}
        shown = set(ReplicaView.model_fields)
        return cls(
            id=live.id,
            **spec.model_dump(exclude={"vllm"}),
            vllm=spec.vllm,
            state=live.state,
            reason=live.reason(engines),
            error=deployment.error,
            servers=tuple(ReplicaView(**each.model_dump(include=shown)) for each in live.replicas),
            job=deployment.job,
            created_at=deployment.created_at,
            links=links,
        )


class DeploymentList(BaseModel):
    object: Literal["list"] = "list"
    data: tuple[DeploymentView, ...]
    has_more: bool
    next: str | None


class WorkerView(BaseModel):
    object: Literal["worker"] = "worker"
    name: str
    host: str
    device: str
    device_name: str
    queue: Literal["jobs", "serve"]
    state: Literal["idle", "measuring", "busy"]  # a worker that measures its device takes jobs
    rates: Basis | None  # what predictions for its device rest on; None: it runs no jobs
    servers: int
    memory_bytes: int | None  # in use on the device, by any process; without a GPU, the host's
    memory_total: int | None
    job: str | None  # shown only to its own tenant
    started_at: datetime
    heartbeat_at: datetime

    @classmethod
    def of(cls, worker: WorkerRecord, *, tenant: str) -> Self:
        return cls(
            name=worker.name,
            host=worker.host,
            device=worker.device,
            device_name=worker.device_name,
            queue=worker.queue,
            state=worker.state,
            rates=worker.rates,
            servers=worker.servers,
            memory_bytes=worker.memory_bytes,
            memory_total=worker.memory_total,
            job=worker.job if worker.tenant == tenant else None,
            started_at=worker.started_at,
            heartbeat_at=worker.heartbeat_at,
        )


class WorkerList(BaseModel):
    object: Literal["list"] = "list"
    data: tuple[WorkerView, ...]
    has_more: bool = False
    next: str | None = None
