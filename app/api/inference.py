"""OpenAI's routes: models, chat completions, completions. Errors have OpenAI's shape."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials
from starlette.concurrency import run_in_threadpool

from app.api.dependencies import Services, authenticated, bearer, services_of
from app.api.gateway import unknown_model
from app.core.access.api_keys import Principal, Scope
from app.core.deployments.deployment import DeploymentState, LiveDeployment

router = APIRouter(prefix="/v1", tags=["inference"])

Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
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


async def caller(services: Services, request: Request, credentials: Credentials) -> Principal:
    """Who calls, if the key may infer. No dependency of a route: those wait for a thread."""
    if credentials is not None:
        principal = await services.callers.authenticate(credentials.credentials)
    else:  # a browser's session, or nobody
        principal = await run_in_threadpool(authenticated, request, services, None)
    principal.require(Scope.INFERENCE)
    return principal


@router.post("/chat/completions", response_class=Response, responses=STREAM, openapi_extra=BODY)
async def create_chat_completion(request: Request, credentials: Credentials) -> Response:
    """Continue a conversation, with the model of the deployment that `model` names."""
    return await relayed(request, credentials)


@router.post("/completions", response_class=Response, responses=STREAM, openapi_extra=BODY)
async def create_completion(request: Request, credentials: Credentials) -> Response:
    """Continue a text, with the model of the deployment that `model` names."""
    return await relayed(request, credentials)


async def relayed(request: Request, credentials: Credentials) -> Response:
    services = services_of(request)
    principal = await caller(services, request, credentials)
    return await services.gateway.answer(request, principal.tenant)


@router.get("/models")
async def list_models(request: Request, credentials: Credentials) -> JSONResponse:
    """The deployments that may be asked, in OpenAI's words."""
    services = services_of(request)
    principal = await caller(services, request, credentials)
    lives = services.routes.of_tenant(principal.tenant)
    data = [model_card(live) for live in lives if live.state is not DeploymentState.FAILED]
    return JSONResponse({"object": "list", "data": data})


@router.get("/models/{name}")
async def read_model(name: str, request: Request, credentials: Credentials) -> JSONResponse:
    """One deployment, in OpenAI's words."""
    services = services_of(request)
    principal = await caller(services, request, credentials)
    live = services.routes.find(principal.tenant, name)
    if live is None:
        raise unknown_model(name)
    return JSONResponse(model_card(live))


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
