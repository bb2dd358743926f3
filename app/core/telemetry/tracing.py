"""OpenTelemetry traces, sent as OTLP over HTTP in JSON; nothing happens unless an endpoint is set.

A trace begins with the request, or with the caller's `traceparent`; the job's record carries it through the
queue to the attempt and its stages. Spans are sent from a thread and dropped if nobody takes them: tracing
must never hold up work.
"""

from __future__ import annotations

import logging
import queue
import re
import secrets
import threading
import time
from typing import Any

import httpx

from app.core.records.specs import Frozen

log = logging.getLogger(__name__)

PARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
MAX_WAITING = 2048
MAX_SENT = 256
LIMIT_S = 5.0


class SpanContext(Frozen):
    """The ids of a span and its trace."""

    trace_id: str
    span_id: str

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-01"


def parse_traceparent(header: str | None) -> SpanContext | None:
    """The span that a caller names (W3C Trace Context); None for none or a malformed one."""
    match = PARENT.fullmatch(header or "")
    if match is None or not int(match[1], 16) or not int(match[2], 16):
        return None
    return SpanContext(trace_id=match[1], span_id=match[2])


class Span:
    """A timed operation, sent when it ends."""

    def __init__(self, tracer: Tracer, name: str, parent: SpanContext | None) -> None:
        self._tracer = tracer
        self._parent = parent
        self._began = time.time_ns()
        self.name = name
        trace_id = parent.trace_id if parent is not None else secrets.token_hex(16)
        self.context = SpanContext(trace_id=trace_id, span_id=secrets.token_hex(8))

    def end(self, **attributes: str | int | None) -> None:
        present = {name: value for name, value in attributes.items() if value is not None}
        self._tracer.take(
            {
                "traceId": self.context.trace_id,
                "spanId": self.context.span_id,
                **({"parentSpanId": self._parent.span_id} if self._parent is not None else {}),
                "name": self.name,
                "kind": 1,
                "startTimeUnixNano": str(self._began),
                "endTimeUnixNano": str(time.time_ns()),
                "attributes": [
                    {"key": f"nibble.{name}", "value": {"stringValue": str(value)}}
                    for name, value in present.items()
                ],
            }
        )


class Tracer:
    """Makes spans and sends those that have ended. Without an endpoint it keeps nothing."""

    def __init__(self, endpoint: str | None, service: str) -> None:
        self._url = f"{endpoint.rstrip('/')}/v1/traces" if endpoint else None
        self._service = service
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None

    def span(self, name: str, parent: SpanContext | None = None) -> Span:
        return Span(self, name, parent)

    def take(self, span: dict[str, Any]) -> None:
        if self._url is None:
            return
        if self._thread is None:  # begun here, so that a forked process has its own
            self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(span)
        except queue.Full:
            log.debug("a span was dropped: too many wait")

    def close(self) -> None:
        """Send what waits, for a few seconds at most."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join(LIMIT_S)
            self._thread = None

    def _run(self) -> None:
        with httpx.Client(timeout=LIMIT_S) as client:
            while True:
                batch = [self._waiting.get()]
                while len(batch) < MAX_SENT and not self._waiting.empty():
                    batch.append(self._waiting.get())
                spans = [span for span in batch if span is not None]
                if spans:
                    self._send(client, spans)
                if len(spans) < len(batch):
                    return

    def _send(self, client: httpx.Client, spans: list[dict[str, Any]]) -> None:
        resource = {"attributes": [{"key": "service.name", "value": {"stringValue": self._service}}]}
        scopes = [{"scope": {"name": "nibble"}, "spans": spans}]
        body = {"resourceSpans": [{"resource": resource, "scopeSpans": scopes}]}
        try:
            assert self._url is not None
            client.post(self._url, json=body).raise_for_status()
        except httpx.HTTPError as fault:
            log.warning("%d spans were not taken: %s", len(spans), fault)
