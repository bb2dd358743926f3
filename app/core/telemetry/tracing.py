"""OpenTelemetry traces, sent as OTLP over HTTP in protobuf; nothing happens unless an endpoint is set.

A trace begins with the request, or with the caller's `traceparent`; the job's record carries it through the
queue to the attempt and its stages. A caller who does not sample is not traced. Spans are sent from a thread
and dropped if nobody takes them: tracing must never hold up work.
"""

from __future__ import annotations

import logging
import queue
import re
import secrets
import threading
import time
from collections.abc import Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import httpx

from app.core.records.specs import Frozen
from app.core.settings import Settings

if TYPE_CHECKING:  # imported by whoever sends: a megabyte that most processes never need
    from opentelemetry.proto.common.v1.common_pb2 import KeyValue

log = logging.getLogger(__name__)

PARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
SAMPLED = 1
MAX_WAITING = 2048
MAX_SENT = 256
LIMIT_S = 5.0

Attributes = Mapping[str, str | int]


class SpanKind(IntEnum):
    """What a span is to its trace, with OTLP's numbers."""

    INTERNAL = 1
    SERVER = 2
    CONSUMER = 5


class SpanContext(Frozen):
    """The ids of a span and its trace, and whether the trace is recorded."""

    trace_id: str
    span_id: str
    is_sampled: bool = True

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{SAMPLED if self.is_sampled else 0:02x}"


class EndedSpan(NamedTuple):
    """A span as it is sent; times are nanoseconds since 1970."""

    context: SpanContext
    parent: SpanContext | None
    name: str
    kind: SpanKind
    began: int
    ended: int
    error: str | None
    attributes: Attributes


class Destination(NamedTuple):
    """Where spans go, and whose they are. `headers` may hold a key."""

    endpoint: str | None
    service: str
    version: str = "0"
    headers: Mapping[str, str] = {}

    @classmethod
    def of(cls, settings: Settings, service: str, version: str) -> Self:
        return cls(settings.otlp_endpoint, service, version, settings.otlp_header_values)


def parse_traceparent(header: str | None) -> SpanContext | None:
    """The span that a caller names (W3C Trace Context); None for none or a malformed one."""
    match = PARENT.fullmatch(header or "")
    if match is None or not int(match[1], 16) or not int(match[2], 16):
        return None
    return SpanContext(trace_id=match[1], span_id=match[2], is_sampled=bool(int(match[3], 16) & SAMPLED))


class Span:
    """A timed operation, sent when it ends."""

    def __init__(self, tracer: Tracer, name: str, parent: SpanContext | None, kind: SpanKind) -> None:
        self._tracer = tracer
        self._parent = parent
        self._kind = kind
        self._began = time.time_ns()
        self.name = name
        self.context = SpanContext(
            trace_id=parent.trace_id if parent is not None else secrets.token_hex(16),
            span_id=secrets.token_hex(8),
            is_sampled=parent is None or parent.is_sampled,
        )

    def end(self, attributes: Attributes | None = None, *, error: str | None = None) -> None:
        """`error` is what went wrong, in a word or a sentence; None if nothing did."""
        if self.context.is_sampled:
            self._tracer.take(
                EndedSpan(
                    self.context, self._parent, self.name, self._kind, self._began, time.time_ns(), error,
                    attributes or {},
                )
            )  # fmt: skip


class Tracer:
    """Makes spans and sends those that have ended. Without an endpoint it keeps nothing."""

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        self._waiting: queue.Queue[EndedSpan | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._is_away = False  # the collector, as the last batch met it

    def span(self, name: str, parent: SpanContext | None = None, kind: SpanKind = SpanKind.INTERNAL) -> Span:
        return Span(self, name, parent, kind)

    def take(self, span: EndedSpan) -> None:
        if self._destination.endpoint is None:
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
        headers = {"Content-Type": "application/x-protobuf", **self._destination.headers}
        with httpx.Client(timeout=LIMIT_S, headers=headers, trust_env=False) as client:
            while True:
                batch = [self._waiting.get()]
                while len(batch) < MAX_SENT and not self._waiting.empty():
                    batch.append(self._waiting.get())
                spans = [span for span in batch if span is not None]
                if spans:
                    self._send(client, spans)
                if len(spans) < len(batch):
                    return

    def _send(self, client: httpx.Client, spans: list[EndedSpan]) -> None:
        assert self._destination.endpoint is not None
        url = f"{self._destination.endpoint.rstrip('/')}/v1/traces"
        try:
            client.post(url, content=export_request(self._destination, spans)).raise_for_status()
        except httpx.HTTPError as fault:
            if not self._is_away:  # one line until it is back, not one for each batch
                log.warning("spans are dropped until the collector takes them again: %s", fault)
            self._is_away = True
        else:
            if self._is_away:
                log.info("the collector takes spans again")
            self._is_away = False


def export_request(destination: Destination, spans: list[EndedSpan]) -> bytes:
    """The body of an OTLP export (opentelemetry-proto 1.45, ExportTraceServiceRequest)."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Status
    from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage

    def message(span: EndedSpan) -> Any:  # Any: the messages' classes are made at run time
        return SpanMessage(
            trace_id=bytes.fromhex(span.context.trace_id),
            span_id=bytes.fromhex(span.context.span_id),
            parent_span_id=bytes.fromhex(span.parent.span_id) if span.parent is not None else b"",
            name=span.name,
            kind=int(span.kind),  # type: ignore[arg-type]  # an enumeration's number is one
            start_time_unix_nano=span.began,
            end_time_unix_nano=span.ended,
            attributes=key_values(span.attributes),
            status=None if span.error is None else Status(code=Status.STATUS_CODE_ERROR, message=span.error),
        )

    resource = ResourceSpans(scope_spans=[ScopeSpans(spans=[message(span) for span in spans])])
    resource.scope_spans[0].scope.name = "nibble"
    resource.resource.attributes.extend(
        key_values({"service.name": destination.service, "service.version": destination.version})
    )
    return bytes(ExportTraceServiceRequest(resource_spans=[resource]).SerializeToString())


def key_values(attributes: Attributes) -> list[KeyValue]:
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

    return [
        KeyValue(
            key=name,
            value=AnyValue(int_value=value) if isinstance(value, int) else AnyValue(string_value=value),
        )
        for name, value in attributes.items()
    ]
