"""The HTTP routes: OpenAI's, and what operators ask."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from app.core.errors import InvalidRequest, MalformedRequest, NibbleError, NotFound
from workers.serving import chat, completions
from workers.serving.answers import DONE, Reply, event
from workers.serving.errors import error_body, kind_of, retry_headers
from workers.serving.protocol import Body, ChatRequest, CompletionRequest
from workers.serving.served_model import Prompts, ServedModel, unknown_fields

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 * 1024**2
EVENT_STREAM = "text/event-stream; charset=utf-8"
# Proxies on the way shall not collect the stream.
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

B = TypeVar("B", bound=Body)


def create_app(served: ServedModel) -> FastAPI:
    """The application around one model; nothing is started."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_exception_handler(NibbleError, on_nibble_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_http_error)
    created = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        request = await parse(http, ChatRequest)
        served.check_name(request.model)
        prompts = await asyncio.to_thread(served.chat_prompts, request)
        reply = begin(served, request, prompts, "chatcmpl", "chat.completion")
        if request.stream:
            return await streamed(reply, chat.stream(reply, request))
        return await whole(http, reply, chat.respond(reply, request))

    @app.post("/v1/completions")
    async def text_completions(http: Request) -> Response:
        request = await parse(http, CompletionRequest)
        served.check_name(request.model)
        prompts = await asyncio.to_thread(served.completion_prompts, request)
        reply = begin(served, request, prompts, "cmpl", completions.OBJECT)
        if request.stream:
            return await streamed(reply, completions.stream(reply, request))
        return await whole(http, reply, completions.respond(reply, request))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_entry(served, created)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        served.check_name(name)
        return model_entry(served, created)

    add_operations(app, served)
    return app


def add_operations(app: FastAPI, served: ServedModel) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Empty; 503 when the engine is dead or the server is about to end."""
        healthy = served.engine.failure is None and not served.engine.draining
        return Response(status_code=200 if healthy else 503)

    @app.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": version("nibble")}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def model_entry(served: ServedModel, created: int) -> dict[str, Any]:
    return {
        "id": served.name, "object": "model", "created": created, "owned_by": "nibble", "root": served.name,
        "parent": None, "max_model_len": served.max_model_len, "permission": [],
    }  # fmt: skip


async def parse(http: Request, kind: type[B]) -> B:
    """The body. Raises MalformedRequest or InvalidRequest, naming the field."""
    content = b""
    async for part in http.stream():
        content += part
        if len(content) > MAX_BODY_BYTES:
            raise MalformedRequest(
                f"the body is larger than {MAX_BODY_BYTES} bytes", remedy="send a shorter prompt"
            )
    try:
        body = kind.model_validate(json.loads(content))
    except ValidationError as fault:
        first = fault.errors()[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        raise InvalidRequest(
            f"{param or 'body'}: {first['msg']}", param=param, code="invalid_value"
        ) from fault
    except (ValueError, RecursionError) as fault:
        raise MalformedRequest(f"the body is not JSON: {fault}", remedy="send a JSON object") from fault
    unknown = unknown_fields(body)
    if unknown:
        log.info("fields without effect: %s", ", ".join(repr(name[:64]) for name in unknown[:20]))
    return body


def begin(served: ServedModel, request: Body, prompts: Prompts, prefix: str, kind: str) -> Reply:
    return Reply(served, request, served.start(request, prompts), prefix, kind)


async def whole(http: Request, reply: Reply, work: Awaitable[dict[str, Any]]) -> Response:
    """The response when it is complete; if the caller goes first, what runs for it is cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return json_response(await task) if task.done() else Response(status_code=499)
    finally:
        gone.cancel()
        task.cancel()
        reply.answer.cancel()


async def disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def streamed(reply: Reply, frames: AsyncIterator[bytes]) -> Response:
    """A stream whose first frame is there: what fails before it is an ordinary error."""
    try:
        first = await anext(frames)
    except BaseException:
        reply.answer.cancel()
        raise
    return StreamingResponse(guarded(reply, first, frames), media_type=EVENT_STREAM, headers=STREAM_HEADERS)


async def guarded(reply: Reply, first: bytes, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The frames; an error in the midst of them is a frame as well. A caller that goes ends the work."""
    try:
        yield first
        async for frame in frames:
            yield frame
    except NibbleError as error:
        yield event(error_body(error))
        yield DONE
    finally:
        reply.answer.cancel()


def json_response(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return Response(content, status, headers, "application/json")


async def on_nibble_error(_http: Request, error: Exception) -> Response:
    assert isinstance(error, NibbleError)
    return json_response(error_body(error), kind_of(error)[0], retry_headers(error))


async def on_http_error(http: Request, error: Exception) -> Response:
    """What the framework itself refuses: no such route, no such method."""
    status = error.status_code if isinstance(error, HTTPException) else 400
    problem = NotFound(f"{http.method} {http.url.path}: {error}", code="not_found")
    return JSONResponse(error_body(problem), status)
