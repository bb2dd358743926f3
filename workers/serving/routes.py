"""The HTTP routes: OpenAI's, and those for operators."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from app.core.changes.departure import CallerGone, disconnected, unless_gone
from app.core.errors import BodyTooLarge, InvalidRequest, MalformedRequest, NibbleError, field_fault
from app.core.faults.error_answers import InferenceAnswer, inference_answer, inference_refusal
from workers.serving import chat_answers, completions, messages, responses
from workers.serving.answers import DONE, Reply, event
from workers.serving.conversations import chat_prompts
from workers.serving.messages_body import CountRequest, MessagesRequest
from workers.serving.protocol import Body, ChatRequest, CompletionRequest, Received
from workers.serving.responses_body import ResponsesRequest
from workers.serving.served_model import Prompts, ServedModel
from workers.serving.token_routes import (
    DetokenizeRequest,
    TokenizeRequest,
    chat_tokens,
    detokenized,
    tokenized,
)
from workers.serving.unsupported import refuse_unsupported, unknown_fields

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 * 1024**2
MAX_REPORTED = 1000  # faults of a body that are looked at
# How pydantic names the kinds of value that a field may have, in the path of a fault.
KIND_OF_VALUE = re.compile(r"^(?:str|int|float|bool)$|[^a-z0-9_]")
EVENT_STREAM = "text/event-stream; charset=utf-8"
# Keeps proxies from buffering the stream.
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

B = TypeVar("B", bound=Received)
T = TypeVar("T")


def create_app(served: ServedModel) -> Starlette:
    """The application around one model; nothing is started."""
    inference, operations = InferenceRoutes(served), OperationRoutes(served)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", inference.chat_completions, methods=["POST"]),
            Route("/v1/completions", inference.text_completions, methods=["POST"]),
            Route("/v1/responses", inference.responses, methods=["POST"]),
            Route("/v1/messages", inference.messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", inference.count_tokens, methods=["POST"]),
            Route("/v1/embeddings", inference.embeddings, methods=["POST"]),
            Route("/tokenize", inference.tokenize, methods=["POST"]),
            Route("/detokenize", inference.detokenize, methods=["POST"]),
            Route("/v1/models", inference.models),
            Route("/v1/models/", inference.models),
            Route("/v1/models/{name:path}", inference.model),
            Route("/health", operations.health),
            Route("/ping", operations.health, methods=["GET", "POST"]),
            Route("/version", operations.version),
            Route("/metrics", operations.metrics),
        ],
        exception_handlers={
            NibbleError: on_nibble_error,
            HTTPException: on_http_error,
            CallerGone: on_gone,
            Exception: on_fault,
        },
    )


class InferenceRoutes:
    """OpenAI's, Anthropic's, and vLLM's for tokens."""

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self.created = int(time.time())

    async def chat_completions(self, http: Request) -> Response:
        request = await parse(http, ChatRequest)
        reply = await self.converse(request)
        if request.stream:
            return await streamed(http, reply, chat_answers.stream(reply, request))
        return json_response(await awaited(http, reply, chat_answers.respond(reply, request)))

    async def text_completions(self, http: Request) -> Response:
        request = await parse(http, CompletionRequest)
        self.served.check_name(request.model)
        prompts = await asyncio.to_thread(self.served.completion_prompts, request)
        reply = begin(self.served, request, prompts, "cmpl", completions.OBJECT)
        if request.stream:
            return await streamed(http, reply, completions.stream(reply, request))
        return json_response(await awaited(http, reply, completions.respond(reply, request)))

    async def converse(self, request: ChatRequest) -> Reply:
        """The answer to a conversation, under way."""
        self.served.check_name(request.model)
        prompts = await asyncio.to_thread(chat_prompts, self.served, request)
        return begin(self.served, request, prompts, "chatcmpl", "chat.completion")

    async def responses(self, http: Request) -> Response:
        asked = await parse(http, ResponsesRequest)
        chat = translated(asked)
        reply = await self.converse(chat)
        if chat.stream:
            return await streamed(http, reply, responses.stream(reply, asked, chat))
        return json_response(await awaited(http, reply, responses.respond(reply, asked, chat)))

    async def messages(self, http: Request) -> Response:
        chat = translated(await parse(http, MessagesRequest))
        reply = await self.converse(chat)
        if chat.stream:
            return await streamed(http, reply, messages.stream(reply, chat))
        return json_response(await awaited(http, reply, messages.respond(reply, chat)))

    async def count_tokens(self, http: Request) -> Response:
        chat = translated(await parse(http, CountRequest))
        self.served.check_name(chat.model)
        tokens = await asyncio.to_thread(chat_tokens, self.served, chat)
        return json_response({"input_tokens": len(tokens)})

    async def tokenize(self, http: Request) -> Response:
        request = await parse(http, TokenizeRequest)
        with refused_fields():
            return json_response(await asyncio.to_thread(tokenized, self.served, request))

    async def detokenize(self, http: Request) -> Response:
        request = await parse(http, DetokenizeRequest)
        return json_response(await asyncio.to_thread(detokenized, self.served, request))

    async def embeddings(self, _http: Request) -> Response:
        raise InvalidRequest(
            f"{self.served.name} generates text and gives no embeddings", code="embeddings_not_supported",
            param="model", remedy="deploy a model of embeddings with engine: vllm",
        )  # fmt: skip

    async def models(self, _http: Request) -> Response:
        return json_response({"object": "list", "data": [model_entry(self.served, self.created)]})

    async def model(self, http: Request) -> Response:
        self.served.check_name(http.path_params["name"])
        return json_response(model_entry(self.served, self.created))


class OperationRoutes:
    """Routes for operators and the worker."""

    def __init__(self, served: ServedModel) -> None:
        self.served = served

    async def health(self, _http: Request) -> Response:
        """Empty; 503 when the engine is dead or the server is about to end."""
        engine = self.served.engine
        return Response(status_code=200 if engine.failure is None and not engine.draining else 503)

    async def version(self, _http: Request) -> Response:
        return json_response({"version": version("nibble")})

    async def metrics(self, _http: Request) -> Response:
        return Response(self.served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def model_entry(served: ServedModel, created: int) -> dict[str, Any]:
    return {
        "id": served.name, "object": "model", "created": created, "owned_by": "nibble", "root": served.name,
        "parent": None, "max_model_len": served.max_model_len, "permission": [],
    }  # fmt: skip


async def parse(http: Request, kind: type[B]) -> B:
    """The body. Raises MalformedRequest or InvalidRequest, naming the field."""
    content = bytearray()
    async for chunk in http.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise BodyTooLarge(
                f"the body is larger than {MAX_BODY_BYTES} bytes", remedy="send a shorter prompt"
            )
    with refused_fields():
        body = kind.model_validate_json(content)
    if isinstance(body, Body):
        check_fields(body)
    return body


def translated(asked: ResponsesRequest | CountRequest) -> ChatRequest:
    """Another contract's body as a chat. Raises InvalidRequest."""
    with refused_fields():
        chat = asked.to_chat()
    check_fields(chat)
    return chat


def check_fields(body: Body) -> None:
    """Raises InvalidRequest for a field whose effect would be missed; logs those that nobody knows."""
    refuse_unsupported(body)
    unknown = unknown_fields(body)
    if unknown:
        log.info("fields without effect: %s", ", ".join(repr(name[:64]) for name in unknown[:20]))


@contextmanager
def refused_fields() -> Iterator[None]:
    """Turns pydantic's error into one for the caller."""
    try:
        yield
    except ValidationError as fault:
        raise refused_body(fault) from fault


def refused_body(fault: ValidationError) -> NibbleError:
    """The error for one wrong field. For a union, the error of the kind that fits best."""
    if fault.error_count() > MAX_REPORTED:  # of a mapping: lists end at their first
        return InvalidRequest(f"{fault.error_count()} values of the body are wrong", code="invalid_value")
    errors = fault.errors()
    if errors[0]["type"] == "json_invalid":
        return MalformedRequest(
            f"the body is not valid JSON: {field_fault(errors[0])}",
            code="json_invalid",
            remedy="send a JSON object",
        )
    best = max(errors, key=fitness)
    param = ".".join(str(key) for key in best["loc"] if not KIND_OF_VALUE.search(str(key))) or None
    message = field_fault(best)
    return InvalidRequest(f"{param}: {message}" if param else message, param=param, code="invalid_value")


def fitness(fault: Any) -> tuple[bool, int, bool]:
    """Rank of an error: our own messages first, then deeper ones, then those beyond a wrong type."""
    return fault["type"] == "value_error", len(fault["loc"]), not fault["type"].endswith("_type")


def begin(served: ServedModel, request: Body, prompts: Prompts, prefix: str, kind: str) -> Reply:
    return Reply(served, request, served.start(request, prompts), prefix, kind)


async def awaited(http: Request, reply: Reply, work: Awaitable[T]) -> T:
    """The result of `work`. If it fails or the caller leaves first, what runs for the reply is cancelled."""
    gone = asyncio.create_task(disconnected(http.receive))
    try:
        return await unless_gone(gone, work)
    except BaseException:
        reply.answer.cancel()
        raise
    finally:
        gone.cancel()


async def streamed(http: Request, reply: Reply, frames: AsyncIterator[bytes]) -> Response:
    """A stream whose first frame is there: what fails before it is an ordinary error."""
    first = await awaited(http, reply, anext(frames))
    return StreamingResponse(guarded(reply, first, frames), media_type=EVENT_STREAM, headers=STREAM_HEADERS)


async def guarded(reply: Reply, first: bytes, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The frames; an error in the midst of them is a frame as well. A caller that goes ends the work."""
    try:
        yield first
        async for frame in frames:
            yield frame
    except NibbleError as error:
        yield event(inference_answer(error).body)
        yield DONE
    finally:
        reply.answer.cancel()


def json_response(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return Response(content, status, headers, "application/json")


def error_response(answer: InferenceAnswer, more: Mapping[str, str] | None = None) -> Response:
    return json_response(answer.body, answer.status, {**answer.headers, **(more or {})})


async def on_nibble_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, NibbleError)
    return error_response(inference_answer(error, path=http.url.path))


async def on_http_error(http: Request, error: Exception) -> Response:
    """Answers the framework's own errors: an unknown route or method."""
    assert isinstance(error, HTTPException)
    refusal = inference_refusal(error.status_code, http.method, http.url.path)
    answer = inference_answer(refusal, status=error.status_code, path=http.url.path)
    return error_response(answer, error.headers)


async def on_gone(_http: Request, _error: Exception) -> Response:
    return Response(status_code=499)


async def on_fault(http: Request, error: Exception) -> Response:
    """Answers any other exception; the framework logs it with its trace."""
    return await on_nibble_error(http, NibbleError(f"the server failed: {type(error).__name__}"))
