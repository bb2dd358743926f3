"""Traces, as a collector receives them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from pydantic import ValidationError
from redis import Redis

from app.commands.terminal import read_settings
from app.core.child.assignment import Assignment
from app.core.child.job_child import JobChild
from app.core.errors import InvalidRequest
from app.core.settings import Settings
from app.core.telemetry.tally import Tally
from app.core.telemetry.tracing import LIMIT_S, Destination, Tracer, parse_traceparent
from app.core.telemetry.version import package_version
from tests.integration.api_service import ADMIN_KEY, EXAMPLES, MODEL, Service, running_service
from tests.integration.workshop import Workshop
from tests.servers import running
from tests.waiting import wait_until

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


class Collector(ThreadingHTTPServer):
    """An OTLP receiver, whose messages are OpenTelemetry's own."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Reception)
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []
        self.keys: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def named(self, name: str) -> Span:
        wait_until(lambda: name in {span.name for span in self.spans})
        return next(span for span in self.spans if span.name == name)


class Reception(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.headers["Content-Type"] == "application/x-protobuf"
        export = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in export.resource_spans:
            self.server.resources.append(attributes(resource.resource))
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.server.keys.add(self.headers.get("x-team-key"))
        self.send_response(200 if self.path == "/v1/traces" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


def attributes(message: Any) -> dict[str, Any]:
    return {each.key: each.value.string_value or each.value.int_value for each in message.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with running(Collector()) as server:
        yield server


@pytest.fixture
def traced(redis_url: str, tmp_path: Path, collector: Collector) -> Iterator[Service]:
    settings = Settings(
        state_dir=tmp_path / "api",
        redis_url=redis_url,
        model_roots=(EXAMPLES,),
        bootstrap_api_key=ADMIN_KEY,
        otlp_endpoint=collector.url,
        otlp_headers="x-team-key=a%20b",
    )
    with running_service(settings) as service:
        yield service


def test_a_trace_leads_from_the_request_to_the_stages(
    redis: Redis, redis_url: str, tmp_path: Path, collector: Collector, traced: Service
) -> None:
    job = traced.client.post("/v1/jobs", json={"model": MODEL}, headers={"traceparent": PARENT})
    workshop = Workshop(redis, redis_url, tmp_path / "state", otlp_endpoint=collector.url)
    workshop.run(workshop.store.load(job.json()["id"]))
    attempt, request = collector.named("attempt"), collector.named("POST /v1/jobs")
    assert request.trace_id.hex() == attempt.trace_id.hex() == TRACE
    assert request.parent_span_id.hex() == PARENT.split("-")[2]
    assert attempt.parent_span_id == request.span_id
    assert (request.kind, attempt.kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CONSUMER)
    assert attempt.status.code == Status.STATUS_CODE_UNSET
    for name in ("fetching", "calibrating", "publishing"):
        stage = collector.named(name)
        assert stage.parent_span_id == attempt.span_id
        assert stage.kind == Span.SPAN_KIND_INTERNAL
        assert stage.start_time_unix_nano <= stage.end_time_unix_nano
    services = {each["service.name"] for each in collector.resources}
    assert services == {"nibble-api", "nibble-worker"}
    assert {each["service.version"] for each in collector.resources} == {package_version()}


def test_a_request_has_the_attributes_of_http_and_the_key_of_the_collector(
    collector: Collector, traced: Service
) -> None:
    assert traced.client.get("/v1/jobs/job_01ARZ3NDEKTSV4RRFFQ69G5FAV").status_code == 404
    span = collector.named("GET /v1/jobs/{job_id}")
    shown = attributes(span)
    assert shown["http.request.method"] == "GET"
    assert shown["http.route"] == "/v1/jobs/{job_id}"
    assert shown["http.response.status_code"] == 404
    assert shown["url.path"] == "/v1/jobs/job_01ARZ3NDEKTSV4RRFFQ69G5FAV"
    assert span.status.code == Status.STATUS_CODE_UNSET  # the caller's mistake, not the server's
    assert collector.keys == {"a b"}


def test_a_fault_of_the_service_is_an_error(
    collector: Collector, traced: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("app.core.storage.artifact_store.ArtifactStore.page", broken)
    assert traced.client.get("/v1/artifacts").status_code == 500
    assert collector.named("GET /v1/artifacts").status.code == Status.STATUS_CODE_ERROR


def test_fetching_ends_before_the_jobs_process_starts(
    redis: Redis, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its start, with its imports, may take longer than what was fetched."""
    counted: list[int] = []

    class Child(JobChild):
        def __init__(self, assignment: Assignment, *, module: str) -> None:
            counted.append(Tally(redis).stages()["fetching"].times)
            super().__init__(assignment, module=module)

    monkeypatch.setattr("workers.attempts.attempt.JobChild", Child)
    workshop = Workshop(redis, redis_url, tmp_path / "state")
    assert workshop.run(workshop.submit()).error is None
    assert counted == [1]
    assert Tally(redis).stages()["fetching"].times == 1


def test_a_failed_attempt_is_an_error_with_its_code(
    redis: Redis, redis_url: str, tmp_path: Path, collector: Collector
) -> None:
    workshop = Workshop(redis, redis_url, tmp_path / "state", otlp_endpoint=collector.url)
    job = workshop.run(workshop.submit(model=(tmp_path / "none").as_uri()))
    assert job.error is not None
    attempt = collector.named("attempt")
    assert attempt.status.code == Status.STATUS_CODE_ERROR
    assert attempt.status.message == job.error.code


def test_who_does_not_sample_is_not_traced_and_neither_are_probes(
    collector: Collector, traced: Service
) -> None:
    unsampled = f"00-{TRACE}-b7ad6b7169203331-00"
    traced.client.get("/v1/workers", headers={"traceparent": unsampled})
    for probe in ("/healthz", "/readyz", "/metrics"):
        assert traced.client.get(probe).status_code == 200
    job = traced.client.post("/v1/jobs", json={"model": MODEL}, headers={"traceparent": unsampled}).json()
    assert (traced.store.load(job["id"]).traceparent or "").endswith("-00")
    traced.client.get("/v1/artifacts")
    collector.named("GET /v1/artifacts")
    assert {span.name for span in collector.spans} == {"GET /v1/artifacts"}


def test_a_collector_that_is_away_gives_one_line(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    tracer = Tracer(Destination("http://127.0.0.1:9", "test"))
    for _ in range(3):
        tracer.span("x").end()
        tracer.close()
    assert [record.levelname for record in caplog.records if "spans are dropped" in record.message] == [
        "WARNING"
    ]


def test_without_an_endpoint_or_a_collector_nothing_is_held_up() -> None:
    for endpoint in (None, "http://127.0.0.1:9"):
        tracer = Tracer(Destination(endpoint, "test"))
        began = time.monotonic()
        for _ in range(3000):
            tracer.span("x").end()
        tracer.close()
        assert time.monotonic() - began < LIMIT_S
    assert parse_traceparent("00-" + "0" * 32 + "-b7ad6b7169203331-01") is None
    assert parse_traceparent("nonsense") is None


@pytest.mark.parametrize("headers", ["secret-key", "a key=value", "a=b,,c=d"])
def test_malformed_headers_are_refused_without_showing_them(
    headers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIBBLE_OTLP_HEADERS", headers)
    with pytest.raises(ValidationError, match="is not written as name=value") as refusal:
        Settings()
    assert headers not in str(refusal.value)
    with pytest.raises(InvalidRequest, match="NIBBLE_OTLP_HEADERS: ") as shown:
        read_settings()
    assert headers not in shown.value.message
