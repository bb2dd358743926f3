"""OpenAI's routes: models, chat completions, completions. Errors have OpenAI's shape."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from app.api.dependencies import Inferrer, ServicesParam
from app.api.gateway import unknown_model
from app.api.services import Services
from app.core.deployments.chat_sampling import chat_sampling
from app.core.deployments.deployment import DeploymentState, LiveDeployment
from app.core.errors import NibbleError
from app.core.storage.artifact_store import file_key

router = APIRouter(prefix="/v1", tags=["inference"])

BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model"],
                    "properties": {"model": {"type": "string", "description": "Name of a deployment."}},
                    "additionalProperties": True,
                }
            }
        },
    }
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "OpenAI's answer; with `stream`, server-sent events.", "content": {
        "application/json": {}, "text/event-stream": {}}},
    503: {"description": "The model is loading; ask again after Retry-After seconds."},
}  # fmt: skip


@router.post("/chat/completions", response_class=Response, responses=STREAM, openapi_extra=BODY)
async def create_chat_completion(request: Request, services: ServicesParam, principal: Inferrer) -> Response:
    """Continue a conversation with the deployment named `model`."""
    return await services.gateway.answer(request, principal.tenant)


@router.post("/completions", response_class=Response, responses=STREAM, openapi_extra=BODY)
async def create_completion(request: Request, services: ServicesParam, principal: Inferrer) -> Response:
    """Continue a text with the deployment named `model`."""
    return await services.gateway.answer(request, principal.tenant)


@router.get("/models/", include_in_schema=False)
@router.get("/models")
async def list_models(services: ServicesParam, principal: Inferrer) -> JSONResponse:
    """The tenant's deployments as OpenAI's list of models."""
    lives = services.routes.of_tenant(principal.tenant)
    data = [model_card(live) for live in lives if live.state is not DeploymentState.FAILED]
    return JSONResponse({"object": "list", "data": data})


@router.get("/models/{name:path}")  # clients ask for names such as org/model
async def read_model(name: str, services: ServicesParam, principal: Inferrer) -> JSONResponse:
    """One deployment as OpenAI's model object, with the parameters that a chat should start with."""
    live = services.routes.find(principal.tenant, name)
    if live is None:
        raise unknown_model(name)
    sampling = await run_in_threadpool(sampling_of, services, principal.tenant, live.spec.artifact)
    return JSONResponse({**model_card(live), "sampling": sampling})


def sampling_of(services: Services, tenant: str, artifact: str) -> dict[str, Any] | None:
    """None if the artifact can't be read now."""
    try:
        manifest = services.artifacts.get(tenant, artifact)
        sampling = chat_sampling(lambda path: services.objects.get(file_key(manifest, path)))
    except NibbleError:
        return None
    return sampling.model_dump()


def model_card(live: LiveDeployment) -> dict[str, Any]:
    lengths = [replica.max_model_len for replica in live.replicas if replica.max_model_len is not None]
    return {
        "id": live.spec.name,
        "object": "model",
        "created": int(live.deployment.created_at.timestamp()),
        "owned_by": "nibble",
        "root": live.spec.artifact,
        "parent": None,
        "max_model_len": min(lengths, default=None),
        "permission": [],
    }
