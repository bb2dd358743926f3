"""ASGI middleware of every request: an id, a log line, metrics, and a limit to the body."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import error_response
from app.api.metrics import Metrics
from app.core.errors import BodyTooLarge, BodyTooSlow, NibbleError
from app.core.telemetry.logs import log_ids
from app.core.telemetry.tracing import Tracer, parse_traceparent

log = logging.getLogger("app.access")

PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
BODY_LIMIT_S = 60.0  # for the whole body
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
        span = self._tracer.span("request", parse_traceparent(Headers(scope=scope).get("traceparent")))
        with log_ids(request=request_id, trace=span.context.traceparent):
            try:
                await self._app(scope, receive, send_marked)
            finally:
                seconds = time.perf_counter() - started
                self._metrics.request_ends(scope["method"], route_of(scope), status, seconds)
                span.name = f"{scope['method']} {route_of(scope)}"
                span.end(status=status, request=request_id)
                # Unchanged polls and successful probes are logged at debug level only.
                is_quiet = status == 304 or (status < 400 and scope["path"] in PROBES)
                log.log(
                    logging.DEBUG if is_quiet else logging.INFO,
                    "%s %s %d %.1f ms", scope["method"], scope["path"], status, seconds * 1e3,
                    extra={"fields": {"status": status, "seconds": round(seconds, 4)}},
                )  # fmt: skip


def route_of(scope: Scope) -> str:
    """The route's template, so that ids in paths don't multiply the metrics."""
    return getattr(scope.get("route"), "path", "unmatched")


class BodyLimit:
    """Reads the body ahead of the application; answers 413 if it is too large."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
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


def too_slow() -> BodyTooSlow:
    return BodyTooSlow(
        f"the body did not arrive within {BODY_LIMIT_S:g} s",
        remedy="send it again; put large texts into a file and name it as dataset",
    )


async def refuse(refusal: NibbleError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer without reading the rest of the body, and close the connection."""
    answer = error_response(scope["path"], refusal, headers={"Connection": "close"})
    await answer(scope, receive, send)
