"""ASGI middleware of every request: an id, a log line, metrics, and limits to the body."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import error_response
from app.api.metrics import Metrics
from app.core.errors import BodyTooLarge, BodyTooSlow, MalformedRequest, NibbleError
from app.core.records.json_types import KeyRepeated, unrepeated
from app.core.telemetry.logs import log_ids
from app.core.telemetry.tracing import Span, SpanKind, Tracer, parse_traceparent

log = logging.getLogger("app.access")

PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
BODY_LIMIT_S = 60.0  # for the whole body
STREAMED = frozenset({("POST", "/v1/datasets")})  # whose routes read the body themselves, within limits
SECURITY_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class RequestRecord:
    """Assigns each request an id, measures it, and logs one line when its answer has ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracer: Tracer) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        proposed = Headers(scope=scope).get("x-request-id", "")
        request_id = proposed if REQUEST_ID.fullmatch(proposed) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 500

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update({**SECURITY_HEADERS, "X-Request-ID": request_id})
            await send(message)

        started = time.perf_counter()
        self._metrics.request_begins()
        is_probe = scope["path"] in PROBES
        span = None if is_probe else self._span(scope)
        with log_ids(request=request_id, trace=span.context.traceparent if span is not None else None):
            try:
                await self._app(scope, receive, send_marked)
            finally:
                seconds = time.perf_counter() - started
                self._metrics.request_ends(scope["method"], route_of(scope), status, seconds)
                if span is not None:
                    end_span(span, scope, status, request_id)
                # Unchanged polls and successful probes are logged at debug level only.
                is_quiet = status == 304 or (status < 400 and is_probe)
                log.log(
                    logging.DEBUG if is_quiet else logging.INFO,
                    "%s %s %d %.1f ms", scope["method"], scope["path"], status, seconds * 1e3,
                    extra={"fields": {"status": status, "seconds": round(seconds, 4)}},
                )  # fmt: skip

    def _span(self, scope: Scope) -> Span:
        parent = parse_traceparent(Headers(scope=scope).get("traceparent"))
        return self._tracer.span("request", parent, SpanKind.SERVER)


def end_span(span: Span, scope: Scope, status: int, request_id: str) -> None:
    """With OpenTelemetry's HTTP attributes; a caller's mistake (4xx) is no error of the server's span."""
    span.name = f"{scope['method']} {route_of(scope)}"
    attributes: dict[str, str | int] = {
        "http.request.method": scope["method"],
        "http.route": route_of(scope),
        "http.response.status_code": status,
        "url.path": scope["path"],
        "url.scheme": scope["scheme"],
        "user_agent.original": Headers(scope=scope).get("user-agent", "")[:200],
        "nibble.request": request_id,
    }
    span.end(attributes, error=f"HTTP {status}" if status >= 500 else None)


def route_of(scope: Scope) -> str:
    """The route's template, so that ids in paths don't multiply the metrics."""
    return getattr(scope.get("route"), "path", "unmatched")


class BodyLimit:
    """Reads the body ahead of the application; refuses one that is too large, or JSON with a key twice."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_read_ahead(scope):
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        try:
            body = None if length.isdigit() and int(length) > self._max_bytes else await self._read(receive)
        except TimeoutError:
            await refuse(too_slow(), scope, receive, send)
            return
        if body is None:
            await refuse(self._too_large(), scope, receive, send)
            return
        if (ambiguity := ambiguity_of(body)) is not None:
            await error_response(scope["path"], ambiguity)(scope, receive, send)
            return
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None if it is too large. Raises TimeoutError if it does not arrive."""
        body = bytearray()
        async with asyncio.timeout(BODY_LIMIT_S):
            while True:
                message = await receive()
                body += message.get("body", b"")
                if len(body) > self._max_bytes:
                    return None
                if not message.get("more_body", False):
                    return bytes(body)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"the body is larger than {self._max_bytes} bytes",
            remedy="put large texts into a file and name it as dataset",
        )


def ambiguity_of(body: bytes) -> MalformedRequest | None:
    """The error for a key that occurs twice in JSON. What is no JSON is for the route to refuse."""
    if body.lstrip()[:1] not in (b"{", b"["):
        return None
    try:
        json.loads(body, object_pairs_hook=unrepeated)
    except KeyRepeated as fault:
        return MalformedRequest(
            f"the body is ambiguous: {fault}", code="json_key_repeated", remedy="name it once"
        )
    except (ValueError, RecursionError):
        pass
    return None


def is_read_ahead(scope: Scope) -> bool:
    has_body = scope["method"] not in ("GET", "HEAD", "OPTIONS")
    return has_body and (scope["method"], scope["path"]) not in STREAMED


def too_slow() -> BodyTooSlow:
    return BodyTooSlow(
        f"the body did not arrive within {BODY_LIMIT_S:g} s",
        remedy="send it again; put large texts into a file and name it as dataset",
    )


async def refuse(refusal: NibbleError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer without reading the rest of the body, and close the connection."""
    answer = error_response(scope["path"], refusal, headers={"Connection": "close"})
    await answer(scope, receive, send)
