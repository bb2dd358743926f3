"""For operators and their tools: liveness, readiness, metrics."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from redis.exceptions import RedisError

from app.api.dependencies import DeploymentsReader, ServicesParam
from app.api.metrics import DeploymentLoad, Occupancy
from app.api.schemas import ScrapeTarget
from app.api.services import Services
from app.core.deployments.deployment import DeploymentState, LiveDeployment, ReplicaState
from app.core.deployments.placement import placement
from app.core.errors import Unavailable
from app.core.records.job import JobState
from app.core.telemetry.version import package_version

router = APIRouter(tags=["operations"])

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/version", include_in_schema=False)
async def version() -> dict[str, str]:
    """Which Nibble this is; where vLLM says its own."""
    return {"version": package_version()}


@router.get("/health", include_in_schema=False)  # the paths of vLLM and of SageMaker
@router.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
@router.get("/healthz")
async def health() -> dict[str, str]:
    """The process is alive."""
    # On the event loop: a pool thread would queue behind all waiting requests.
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"description": "Redis or storage does not answer."}})
def readiness(services: ServicesParam) -> JSONResponse:
    """Redis and object storage answer: jobs are taken."""
    checks = {"redis": redis_state(services), "storage": storage_state(services)}
    is_ready = all(state == "ok" for state in checks.values())
    content = {"status": "ready" if is_ready else "unavailable", "checks": checks}
    return JSONResponse(content, status_code=200 if is_ready else 503)


def redis_state(services: Services) -> str:
    try:
        services.redis.ping()
    except RedisError as fault:
        return f"failed: {fault}"
    return "ok"


def storage_state(services: Services) -> str:
    try:
        services.objects.check()
    except Unavailable as fault:
        return f"failed: {fault.message}"
    return "ok"


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(services: ServicesParam) -> Response:
    """Prometheus text format."""
    return Response(services.metrics.text(), headers={"Content-Type": METRICS_TYPE})


@router.get("/v1/scrape-targets", response_model=list[ScrapeTarget])
def list_targets(
    request: Request, services: ServicesParam, principal: DeploymentsReader
) -> list[ScrapeTarget]:
    """Where Prometheus reads the metrics of the tenant's servers: the answer to its `http_sd_configs`."""
    return [
        ScrapeTarget(
            targets=(request.url.netloc,),
            labels={
                "__metrics_path__": f"/v1/deployments/{live.id}/servers/{replica.slot}/metrics",
                "__scheme__": request.url.scheme,
                "deployment": live.spec.name,
                "deployment_id": live.id,
                "server": str(replica.slot),
            },
        )
        for live in services.deployments.all()
        if live.deployment.tenant == principal.tenant
        for replica in live.ready
    ]


def occupancy(services: Services) -> Occupancy:
    everyone = services.workers.living()
    living = [worker for worker in everyone if worker.queue == "jobs"]
    oldest = services.jobs.oldest_in(JobState.QUEUED)
    now = datetime.now(UTC)
    busy = sum(worker.job is not None for worker in living)
    deployments = services.deployments.all()
    return Occupancy(
        jobs={str(state): count for state, count in services.jobs.counts().items()},
        queues=services.queue.depths(),
        workers={"busy": busy, "idle": len(living) - busy},
        deployments=counted([live.state for live in deployments], DeploymentState),
        replicas=counted([replica.state for live in deployments for replica in live.replicas], ReplicaState),
        loads={live.id: load_of(live) for live in deployments},
        oldest_s=services.jobs.age_s(oldest) if oldest is not None else 0.0,
        heartbeats_s={worker.name: (now - worker.heartbeat_at).total_seconds() for worker in everyone},
        gpu_bytes={
            worker.name: worker.memory_bytes
            for worker in everyone
            if worker.memory_bytes is not None and worker.device.startswith("cuda")
        },
        stages=services.tally.stages(),
        failures=services.tally.failures(),
    )


def load_of(live: LiveDeployment) -> DeploymentLoad:
    return DeploymentLoad(
        running=sum(replica.running for replica in live.replicas),
        waiting=sum(replica.waiting for replica in live.replicas),
        replicas=len(placement(live)),
        ready=len(live.ready),
    )


def counted(states: Sequence[StrEnum], kinds: type[StrEnum]) -> dict[str, int]:
    """The count of each kind, including zeros."""
    return {str(kind): states.count(kind) for kind in kinds}
