"""OpenAI's routes: models, chat completions, completions. Errors have OpenAI's shape."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException

from app.api.dependencies import Inferrer, ServicesParam
from app.api.errors import MANAGED
from app.api.gateway import unknown_model
from app.api.services import Services
from app.core.deployments.chat_sampling import chat_sampling
from app.core.deployments.deployment import DeploymentState
from app.core.errors import NibbleError
from app.core.storage.artifact_store import file_key

router = APIRouter(tags=["inference"])

SILENT = (DeploymentState.FAILED, DeploymentState.PAUSED)  # of no use to who looks for a model

# Paths below /v1 that have routes of their own here; whatever else there is may be one of a server.
NAMED = (
    "chat/completions", "completions", "embeddings", "messages", "messages/count_tokens", "responses",
    "models(?:/.*)?",
)  # fmt: skip
ANY = ["GET", "POST", "PUT", "PATCH", "DELETE"]
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
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "The server's answer.", "content": {"application/json": {}}}, 503: STREAM[503],
}  # fmt: skip


@router.post("/v1/chat/completions", response_class=Response, responses=STREAM, openapi_extra=BODY)
async def create_chat_completion(request: Request, services: ServicesParam, principal: Inferrer) -> Response:
    """Continue a conversation with the deployment named `model`."""
    return await services.gateway.answer(request, principal.tenant)


@router.post("/v1/completions", response_class=Response, responses=STREAM, openapi_extra=BODY)
async def create_completion(request: Request, services: ServicesParam, principal: Inferrer) -> Response:
    """Continue a text with the deployment named `model`."""
    return await services.gateway.answer(request, principal.tenant)


@router.post("/v1/responses", response_class=Response, responses=STREAM, openapi_extra=BODY)
async def create_response(request: Request, services: ServicesParam, principal: Inferrer) -> Response:
    """OpenAI's newer contract; every request brings its whole conversation, and nothing is stored."""
    return await services.gateway.answer(request, principal.tenant)


@router.post("/v1/messages", response_class=Response, responses=STREAM, openapi_extra=BODY)
async def create_message(request: Request, services: ServicesParam, principal: Inferrer) -> Response:
    """Anthropic's contract; errors have its shape."""
    return await services.gateway.answer(request, principal.tenant)


@router.post("/v1/messages/count_tokens", response_class=Response, responses=ANSWER, openapi_extra=BODY)
async def count_message_tokens(request: Request, services: ServicesParam, principal: Inferrer) -> Response:
    """The tokens of a prompt, in Anthropic's form."""
    return await services.gateway.answer(request, principal.tenant)


@router.post("/v1/embeddings", response_class=Response, responses=ANSWER, openapi_extra=BODY)
async def create_embedding(request: Request, services: ServicesParam, principal: Inferrer) -> Response:
    """Embeddings, where the deployment's server gives them; the built-in engine says that it does not."""
    return await services.gateway.answer(request, principal.tenant)


@router.post("/tokenize", response_class=Response, responses=ANSWER, openapi_extra=BODY)
async def tokenize(request: Request, services: ServicesParam, principal: Inferrer) -> Response:
    """The tokens of a text or a conversation, in vLLM's form."""
    return await services.gateway.answer(request, principal.tenant)


@router.post("/detokenize", response_class=Response, responses=ANSWER, openapi_extra=BODY)
async def detokenize(request: Request, services: ServicesParam, principal: Inferrer) -> Response:
    """The text of tokens, in vLLM's form."""
    return await services.gateway.answer(request, principal.tenant)


@router.get("/v1/models/", include_in_schema=False)
@router.get("/v1/models")
async def list_models(services: ServicesParam, principal: Inferrer) -> JSONResponse:
    """The tenant's deployments as OpenAI's list of models."""
    lives = services.routes.of_tenant(principal.tenant)
    shown = [live for live in lives if live.state not in SILENT]
    data = await run_in_threadpool(services.cards.of_all, shown)
    return JSONResponse({"object": "list", "data": data})


@router.get("/v1/models/{name:path}")  # clients ask for names such as org/model
async def read_model(name: str, services: ServicesParam, principal: Inferrer) -> JSONResponse:
    """One deployment as OpenAI's model object, with the parameters that a chat should start with."""
    live = services.routes.find(principal.tenant, name)
    if live is None:
        raise unknown_model(name)
    card = await run_in_threadpool(services.cards.of, live, name)
    sampling = await run_in_threadpool(sampling_of, services, principal.tenant, live.spec.artifact)
    return JSONResponse({**card, "sampling": sampling})


def sampling_of(services: Services, tenant: str, artifact: str) -> dict[str, Any] | None:
    """None if the artifact can't be read now."""
    try:
        manifest = services.artifacts.get(tenant, artifact)
        sampling = chat_sampling(lambda path: services.objects.get(file_key(manifest, path)))
    except NibbleError:
        return None
    return sampling.model_dump()


class OtherInference(Convertor[str]):
    """Paths below /v1 that no other route has: what a server may answer beyond the routes that are named.

    Also below those, such as vLLM's `chat/completions/render`.
    """

    regex = rf"(?!(?:{'|'.join(sorted(MANAGED))})(?:/|$))(?!(?:{'|'.join(NAMED)})/?$)[^/].*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("other_inference", OtherInference())


@router.api_route("/v1/{path:other_inference}", methods=ANY, include_in_schema=False)
async def pass_on(path: str, request: Request, services: ServicesParam, principal: Inferrer) -> Response:
    """Whatever else the deployment's server answers: vLLM has many routes more, the built-in engine none."""
    if request.method != "POST" or not await services.gateway.is_meant(request):
        raise HTTPException(HTTPStatus.NOT_FOUND)
    return await services.gateway.answer(request, principal.tenant)
