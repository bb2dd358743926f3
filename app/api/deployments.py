"""`/v1/deployments`: serve an artifact, or its original, under a name."""

from __future__ import annotations

import json
import re
from typing import Annotated

import httpx
from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from app.api.dependencies import DeploymentsReader, DeploymentsWriter, ServicesParam
from app.api.paging import PageQuery
from app.api.polled import polled
from app.api.preconditions import (
    UNCHANGED,
    ChangeParam,
    IdempotencyKey,
    IfNoneMatch,
    entity_tag,
    tagged_answer,
)
from app.api.schemas import DeploymentList, DeploymentView
from app.api.services import Services
from app.core.changes.redis_keys import DEPLOYMENTS_STAMP, WORKERS_STAMP
from app.core.deployments.context_length import check_length
from app.core.deployments.deployment import (
    Deployment,
    DeploymentSpec,
    DeploymentState,
    LiveDeployment,
    Served,
)
from app.core.deployments.deployment_change import DeploymentChange
from app.core.deployments.originals import about_original, not_for_vllm, why_own_server
from app.core.deployments.reasons import ServingWorker
from app.core.deployments.served_families import refuse_unserved_format, unserved_note
from app.core.deployments.transitions import removed
from app.core.errors import InvalidRequest, NotFound, Unavailable
from app.core.jobs.submission import refuse_own_storage
from app.core.records.artifact import ArtifactManifest
from app.core.records.ids import check_cursor, new_id
from app.core.records.serving_options import Engine, ServerOptions
from app.core.sources.adapter_model import inspect_merged
from app.core.sources.model_source import open_adapter, open_model
from app.core.storage.artifact_store import file_key

router = APIRouter(prefix="/v1/deployments", tags=["deployments"])

METRICS_LIMIT_S = 5.0
STAMPS_LAST_S = 1.0  # seconds after which a dead replica may have left the list
POLL_AFTER_S = "1"
CHANGING = (DeploymentState.STARTING, DeploymentState.DRAINING)


@router.post("", status_code=202, response_model=DeploymentView)
def create_deployment(
    spec: DeploymentSpec,
    services: ServicesParam,
    principal: DeploymentsWriter,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Record a deployment; a worker with the queue `serve` starts its servers."""
    spec = spec.model_copy(update={"artifact": resolved(services, principal.tenant, spec.artifact)})
    require_servable(services, principal.tenant, spec.served)
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
    query: Annotated[PageQuery, Query()],
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The tenant's deployments, newest first."""
    limit, after = query.limit, query.after
    check_cursor("dep", after)
    own = [live for live in services.deployments.all() if live.deployment.tenant == principal.tenant]
    older = [live for live in own if after is None or live.id < after]
    workers = serving_workers(services)
    views = tuple(DeploymentView.of(live, workers) for live in older[:limit])
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
        services.deployments.get(principal.tenant, deployment_id), serving_workers(services)
    )
    return tagged_answer(view, if_none_match, poll_after(view), revision=view.revision)


@router.patch("/{deployment_id}", status_code=202, response_model=DeploymentView)
def change_deployment(
    deployment_id: str,
    body: DeploymentChange,
    change: ChangeParam,
    services: ServicesParam,
    principal: DeploymentsWriter,
) -> JSONResponse:
    """Scale, pause, rename or replace it while it serves.

    Servers that are to go finish what they have begun. A replacement starts beside what serves, which ends
    only as far as the new servers are ready; if they can't be had, what served goes on, and
    `replacement.error` says why.
    """
    live = services.deployments.get(principal.tenant, deployment_id)
    if body.artifact is not None:
        named = resolved(services, principal.tenant, body.artifact)
        body = body.model_copy(update={"artifact": named})
    served = body.served(live.deployment)
    if served is not None:
        require_servable(services, principal.tenant, served)

    def changed(deployment: Deployment) -> Deployment:
        change.require_match(deployment.revision)
        return body.applied_to(deployment)

    services.deployments.update(live.id, changed)
    services.routes.refresh()
    shown = json.dumps(body.model_dump(mode="json", exclude_unset=True))
    change.request.state.audit_detail = f"{live.spec.name}: {shown}"
    return answer(services, services.deployments.get(principal.tenant, live.id), status=202)


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
    deployment_id: str,
    slot: int,
    services: ServicesParam,
    principal: DeploymentsReader,
    names: Annotated[
        list[str] | None, Query(alias="name[]", description="Names of samples; else all")
    ] = None,
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
    content = metrics.content if names is None else samples_of(metrics.content, names)
    return Response(content, headers={"Content-Type": content_type})


def samples_of(metrics: bytes, names: list[str]) -> bytes:
    """The samples with these names, of Prometheus's text format."""
    named = {name.encode() for name in names}
    lines = metrics.splitlines(keepends=True)
    return b"".join(line for line in lines if re.split(rb"[{ ]", line, maxsplit=1)[0] in named)


def answer(services: Services, live: LiveDeployment, *, status: int = 200) -> JSONResponse:
    """The deployment with a Retry-After hint for polling."""
    view = DeploymentView.of(live, serving_workers(services))
    headers = {"Location": view.links["self"]} if status == 202 else {}
    headers |= poll_after(view)
    headers["ETag"] = entity_tag(view.model_dump_json().encode(), view.revision)
    return JSONResponse(view.model_dump(mode="json"), status_code=status, headers=headers)


def poll_after(view: DeploymentView) -> dict[str, str]:
    is_replacing = view.replacement is not None and view.replacement.error is None
    return {"Retry-After": POLL_AFTER_S} if view.state in CHANGING or is_replacing else {}


def serving_workers(services: Services) -> list[ServingWorker]:
    return [
        ServingWorker(worker.engines, worker.servers, worker.slots)
        for worker in services.workers.living()
        if worker.queue == "serve"
    ]


def serving_engines(services: Services) -> list[tuple[str, ...]]:
    """The engines of each live worker of the queue `serve`."""
    return [worker.engines for worker in serving_workers(services)]


def resolved(services: Services, tenant: str, artifact: str) -> str:
    """The artifact's id; of a tag the one that it points to now: a deployment does not move with it."""
    return services.tags.resolve(tenant, artifact) if "@" in artifact else artifact


def require_servable(services: Services, tenant: str, served: Served) -> None:
    """Refuse what no server could be started with: NotFound, ModelRefused, InvalidRequest."""
    manifest = services.artifacts.get(tenant, served.artifact)
    require_engine(services, served)
    if served.original:
        require_servable_original(services, manifest, served)
        return
    refuse_unserved_format(manifest.format, param="artifact")
    asked = served.for_vllm.max_model_len
    if asked is not None and any(file.path == "config.json" for file in manifest.files):
        config = json.loads(services.objects.get(file_key(manifest, "config.json")))
        check_length(config, served, likely_engine(services, served))


def require_servable_original(services: Services, manifest: ArtifactManifest, served: Served) -> None:
    """Refuse an original that can't be read or served, from its headers, as a job on it would be."""
    settings = services.settings
    with about_original(manifest):
        for reference, param in ((manifest.model, "model"), (manifest.adapter, "adapter")):
            if reference is not None:
                refuse_own_storage(reference, settings, param=param)
        files = open_model(manifest.model, **settings.source_access)
        adapter = manifest.adapter and open_adapter(manifest.adapter, **settings.source_access)
        headers = inspect_merged(files, adapter or None)
    why_own = why_own_server(is_gguf=headers.gguf is not None, has_adapter=adapter is not None)
    if why_own is not None and served.engine == "vllm":
        raise not_for_vllm(why_own)
    engine = "transformers" if why_own is not None else likely_engine(services, served)
    unserved_note(str(headers.config.get("model_type")), engine, param="engine")
    check_length(headers.config, served, engine)


def likely_engine(services: Services, options: ServerOptions) -> Engine:
    """The engine that is asked for; `auto` only where a worker has vLLM, or none lives that could tell."""
    engines = serving_engines(services)
    may_be_vllm = not engines or any("vllm" in offered for offered in engines)
    return "transformers" if options.engine == "auto" and not may_be_vllm else options.engine


def require_engine(services: Services, options: ServerOptions) -> None:
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
