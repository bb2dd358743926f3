"""Traces, as a collector receives them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from app.core.settings import Settings
from app.core.telemetry.tracing import Tracer, parse_traceparent
from tests.integration.api_service import ADMIN_KEY, EXAMPLES, MODEL, running_service
from tests.integration.workshop import Workshop
from tests.servers import running
from tests.waiting import wait_until

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


class Collector(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Reception)
        self.spans: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Reception(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in document["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                self.server.spans += scope["spans"]
        self.send_response(200 if self.path == "/v1/traces" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with running(Collector()) as server:
        yield server


def test_a_trace_leads_from_the_request_to_the_stages(
    redis: Redis, redis_url: str, tmp_path: Path, collector: Collector
) -> None:
    settings = Settings(
        state_dir=tmp_path / "api",
        redis_url=redis_url,
        model_roots=(EXAMPLES,),
        bootstrap_api_key=ADMIN_KEY,
        otlp_endpoint=collector.url,
    )
    with running_service(settings) as service:
        made = service.client.post("/v1/jobs", json={"model": MODEL}, headers={"traceparent": PARENT})
    workshop = Workshop(redis, redis_url, tmp_path / "state", otlp_endpoint=collector.url)
    workshop.run(workshop.store.load(made.json()["id"]))
    wait_until(lambda: "attempt" in {span["name"] for span in collector.spans})
    spans = {span["name"]: span for span in collector.spans if span["traceId"] == TRACE}
    assert spans["POST /v1/jobs"]["parentSpanId"] == PARENT.split("-")[2]
    assert spans["attempt"]["parentSpanId"] == spans["POST /v1/jobs"]["spanId"]
    for stage in ("fetching", "calibrating", "publishing"):
        assert spans[stage]["parentSpanId"] == spans["attempt"]["spanId"]
        assert int(spans[stage]["startTimeUnixNano"]) <= int(spans[stage]["endTimeUnixNano"])


def test_without_an_endpoint_or_a_collector_nothing_is_held_up() -> None:
    for endpoint in (None, "http://127.0.0.1:9"):
        tracer = Tracer(endpoint, "test")
        for _ in range(3000):
            tracer.span("x").end()
        tracer.close()
    assert parse_traceparent("00-" + "0" * 32 + "-b7ad6b7169203331-01") is None
    assert parse_traceparent("nonsense") is None
