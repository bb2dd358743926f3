"""The API's answers. Records of app.core are converted to these, never sent directly."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel

from app.core.deployments.deployment import DeploymentState, LiveDeployment, ReplicaState, Served
from app.core.deployments.placement import ready_count
from app.core.deployments.reasons import ServingWorker, reason
from app.core.jobs.job_store import JobEvent, JobPage
from app.core.jobs.worker_registry import WorkerRecord
from app.core.planning.device_profile import Basis
from app.core.records.job import Job, JobState, Problem, Progress, ResultFigures, Stage
from app.core.records.serving_options import Dtype, Engine, VllmOptions
from app.core.records.specs import JobSpec


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
    worker: str | None  # of its last attempt
    artifacts: tuple[str, ...]
    figures: ResultFigures | None  # of the smallest artifact near the original
    retry_of: str | None
    reused_from: str | None
    has_hub_token: bool  # it was sent with one, which a retry has to bring again
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
            worker=job.worker,
            artifacts=job.artifacts,
            figures=job.figures,
            retry_of=job.retry_of,
            reused_from=job.reused_from,
            has_hub_token=job.has_hub_token,
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
    figures: ResultFigures | None
    error: Problem | None

    @classmethod
    def of(cls, job: Job) -> Self:
        return cls(
            id=job.id,
            state=job.state,
            stage=job.stage,
            progress=job.progress.brief,
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
            model=job.spec.model,
            recipes=tuple(recipe.label for recipe in job.spec.recipes),
            labels=job.spec.labels,
            figures=job.figures,
            error=job.error,
        )


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: tuple[JobView, ...] | tuple[BriefJobView, ...]
    has_more: bool
    next: str | None  # the value of `after` for the next page
    counts: dict[JobState, int] | None  # of all the tenant's jobs, if the query asks for them

    @classmethod
    def of(cls, page: JobPage, *, brief: bool = False, counts: dict[JobState, int] | None = None) -> Self:
        data: tuple[JobView, ...] | tuple[BriefJobView, ...]
        if brief:
            data = tuple(BriefJobView.of(job) for job in page.jobs)
        else:
            data = tuple(JobView.of(job) for job in page.jobs)
        cursor = page.jobs[-1].id if page.has_more else None
        return cls(data=data, has_more=page.has_more, next=cursor, counts=counts)


class JobExport(BaseModel):
    object: Literal["job.export"] = "job.export"
    id: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    artifacts: dict[str, str]


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


class ReplicaView(BaseModel):
    slot: int
    generation: int  # the deployment's, or that of its replacement; another one ends
    worker: str
    engine: str
    state: ReplicaState
    running: int
    waiting: int
    restarts: int
    note: str
    since: datetime


class ReplacementView(BaseModel):
    """What takes the place of what a deployment serves."""

    generation: int
    served: Served
    ready: int  # servers, of the deployment's replicas
    error: Problem | None  # why it can't be had; what served before goes on


class DeploymentView(BaseModel):
    object: Literal["deployment"] = "deployment"
    id: str
    name: str
    artifact: str
    original: bool  # the model that the artifact was made of is served
    engine: Engine
    state: DeploymentState
    reason: str  # explains any state but ready
    error: Problem | None
    idle_timeout_s: int | None
    aliases: tuple[str, ...]
    replicas: int  # requested
    dtype: Dtype | None
    max_model_len: int | None
    max_num_seqs: int | None
    cache_share: float | None
    vllm: VllmOptions | None
    revision: int  # one more with each change by its owner; ETag begins with it
    generation: int  # of its artifact and its servers' options
    replacement: ReplacementView | None  # under way, or failed
    servers: tuple[ReplicaView, ...]  # running or starting
    job: str | None
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, live: LiveDeployment, workers: Sequence[ServingWorker]) -> Self:
        """`workers`: all that serve."""
        deployment, spec = live.deployment, live.spec
        links = {"self": f"/v1/deployments/{live.id}", "artifact": f"/v1/artifacts/{spec.artifact}"}
        shown = set(ReplicaView.model_fields)
        return cls(
            id=live.id,
            **spec.model_dump(exclude={"vllm"}),
            vllm=spec.vllm,
            revision=deployment.revision,
            generation=deployment.generation,
            replacement=replacement_view(live),
            state=live.state,
            reason=reason(live, workers),
            error=deployment.error,
            servers=tuple(ReplicaView(**each.model_dump(include=shown)) for each in live.replicas),
            job=deployment.job,
            created_at=deployment.created_at,
            links=links,
        )


def replacement_view(live: LiveDeployment) -> ReplacementView | None:
    replacement = live.deployment.replacement
    if replacement is None:
        return None
    ready = ready_count(live, replacement.generation)
    return ReplacementView(
        generation=replacement.generation, served=replacement.served, ready=ready, error=replacement.error
    )


class ScrapeTarget(BaseModel):
    """One server's metrics, as Prometheus' HTTP service discovery reads them."""

    targets: tuple[str, ...]
    labels: dict[str, str]


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
