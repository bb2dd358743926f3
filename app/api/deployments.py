"""`/v1/deployments`: serve an artifact under a name."""

from __future__ import annotations

from typing import Annotated

import httpx
from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from app.api.dependencies import DeploymentsReader, DeploymentsWriter, ServicesParam
from app.api.polled import polled
from app.api.preconditions import UNCHANGED, IdempotencyKey, IfNoneMatch, tagged_answer
from app.api.schemas import DeploymentList, DeploymentView
from app.api.services import Services
from app.core.changes.redis_keys import DEPLOYMENTS_STAMP, WORKERS_STAMP
from app.core.deployments.deployment import DeploymentSpec, LiveDeployment
from app.core.deployments.deployment_store import removed
from app.core.deployments.served_families import refuse_unserved_format
from app.core.errors import InvalidRequest, NotFound, Unavailable
from app.core.records.ids import check_cursor, new_id
from app.core.records.specs import DeploymentOptions

router = APIRouter(prefix="/v1/deployments", tags=["deployments"])

METRICS_LIMIT_S = 5.0
STAMPS_LAST_S = 1.0  # seconds after which a dead replica may have left the list
POLL_AFTER = {"starting": "1", "draining": "1"}


@router.post("", status_code=202, response_model=DeploymentView)
def create_deployment(
    spec: DeploymentSpec,
    services: ServicesParam,
    principal: DeploymentsWriter,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Record a deployment; a worker with the queue `serve` starts its servers."""
    manifest = services.artifacts.get(principal.tenant, spec.artifact)
    refuse_unserved_format(manifest.format, param="artifact")
    require_engine(services, spec)
    request = f"deploy {spec.model_dump_json()}"
    fresh_id = services.idempotency.claim(principal.tenant, idempotency_key, request, new_id("dep"))
    deployment = services.deployments.create(principal.tenant, spec, deployment_id=fresh_id)
    services.routes.refresh()
    return answer(services, services.deployments.get(principal.tenant, deployment.id), status=202)


@router.get("", response_model=DeploymentList, responses=UNCHANGED)
@polled(STAMPS_LAST_S, lambda tenant: (DEPLOYMENTS_STAMP, WORKERS_STAMP))
def list_deployments(
    services: ServicesParam,
    principal: DeploymentsReader,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The tenant's deployments, newest first."""
    check_cursor("dep", after)
    own = [live for live in services.deployments.all() if live.deployment.tenant == principal.tenant]
    older = [live for live in own if after is None or live.id < after]
    engines = serving_engines(services)
    views = tuple(DeploymentView.of(live, engines) for live in older[:limit])
    has_more = len(older) > limit
    page = DeploymentList(data=views, has_more=has_more, next=views[-1].id if has_more else None)
    return tagged_answer(page, if_none_match)


@router.get("/{deployment_id}", response_model=DeploymentView, responses=UNCHANGED)
@polled(STAMPS_LAST_S, lambda tenant, deployment_id: (DEPLOYMENTS_STAMP, WORKERS_STAMP))
def read_deployment(
    deployment_id: str,
    services: ServicesParam,
    principal: DeploymentsReader,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The deployment, its state and its replicas."""
    view = DeploymentView.of(
        services.deployments.get(principal.tenant, deployment_id), serving_engines(services)
    )
    return tagged_answer(view, if_none_match, poll_after(view))


@router.delete(
    "/{deployment_id}",
    status_code=202,
    response_model=DeploymentView,
    responses={204: {"description": "Deleted: it had no servers."}},
)
def delete_deployment(deployment_id: str, services: ServicesParam, principal: DeploymentsWriter) -> Response:
    """Stop accepting requests, finish those in progress, then stop. The name is free at once."""
    live = services.deployments.get(principal.tenant, deployment_id)
    deployment = services.deployments.update(live.id, removed)
    gone = services.deployments.forget(deployment)
    services.idempotency.spend(deployment.id)
    services.routes.refresh()
    if gone:
        return Response(status_code=204)
    return answer(services, LiveDeployment(deployment=deployment, replicas=live.replicas), status=202)


@router.get(
    "/{deployment_id}/servers/{slot}/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}},
)
def read_server_metrics(
    deployment_id: str, slot: int, services: ServicesParam, principal: DeploymentsReader
) -> Response:
    """One server's metrics under vLLM's names. The service relays them: a server's address is private."""
    live = services.deployments.get(principal.tenant, deployment_id)
    url = next((replica.url for replica in live.ready if replica.slot == slot), None)
    if url is None:
        raise NotFound(
            f"{live.spec.name} has no server {slot} that answers",
            code="server_not_found",
            remedy="read the deployment: `servers` lists its servers",
        )
    try:
        metrics = httpx.get(f"{url}/metrics", timeout=METRICS_LIMIT_S, trust_env=False)
    except httpx.TransportError as fault:
        raise Unavailable(
            f"server {slot} of {live.spec.name} does not answer: {fault}",
            code="server_silent",
            remedy="try again",
        ) from fault
    content_type = metrics.headers.get("content-type", "text/plain")
    return Response(metrics.content, headers={"Content-Type": content_type})


def answer(services: Services, live: LiveDeployment, *, status: int = 200) -> JSONResponse:
    """The deployment with a Retry-After hint for polling."""
    view = DeploymentView.of(live, serving_engines(services))
    headers = {"Location": view.links["self"]} if status == 202 else {}
    headers |= poll_after(view)
    return JSONResponse(view.model_dump(mode="json"), status_code=status, headers=headers)


def poll_after(view: DeploymentView) -> dict[str, str]:
    return {"Retry-After": POLL_AFTER[view.state]} if view.state in POLL_AFTER else {}


def serving_engines(services: Services) -> list[tuple[str, ...]]:
    """The engines of each live worker of the queue `serve`."""
    return [worker.engines for worker in services.workers.living() if worker.queue == "serve"]


def require_engine(services: Services, options: DeploymentOptions) -> None:
    """Refuse an engine that no live worker has. Without any worker the deployment waits."""
    engines = serving_engines(services)
    if options.engine == "auto" or not engines or any(options.engine in offered for offered in engines):
        return
    raise InvalidRequest(
        f"no worker has {options.engine} installed",
        code=f"{options.engine}_not_installed",
        remedy=f"install {options.engine} on a worker of the queue `serve`, or use another engine",
        param="engine",
    )
