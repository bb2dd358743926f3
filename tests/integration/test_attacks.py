"""Attacks on the HTTP service that have no test elsewhere.

Elsewhere: another tenant's ids, scopes (test_api_operations); keys, sessions, foreign origins and names
(test_api_keys); unknown fields, path parts in model ids (test_api_jobs, test_model_reference);
inner addresses, redirects, rebinding (test_outgoing, test_hub, test_webhooks); pickles, remote code, damaged
headers (test_model_source, test_engine_refusals, test_fuzz); tasks that the queue must not name
(test_worker_process); secrets in a child's environment, its network (test_supervisor, test_job_child);
forged log lines (test_logs); limits (test_api_limits); endless patterns (test_fuzz); chat templates
(tests/unit/workers/serving).
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from app.core.redis_server import connect
from tests.integration.api_service import ADMIN_KEY, MODEL, Service
from tests.integration.workshop import Workshop

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 90_000,
        b'{"model":' * 9_000,
        b'{"model": "\\ud800"}',
        b'{"model": NaN, "timeout_s": Infinity}',
        b"\xff\xfe{}",
        b'{"model": "' + b"a" * 90_000 + b'"}',
        json.dumps({"model": MODEL, "timeout_s": 10**400}).encode(),
        json.dumps({"model": MODEL, "labels": {"__proto__": "x", "a\x00b": "y"}}).encode(),
        json.dumps({"model": MODEL, "tenant": "other", "state": "succeeded", "id": "job_x"}).encode(),
    ],
    ids=["arrays", "objects", "surrogate", "nan", "encoding", "long", "number", "labels", "fields"],
)
def test_hostile_bodies_are_refused(service: Service, body: bytes) -> None:
    answer = service.client.post("/v1/jobs", content=body, headers=JSON)
    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.content) < 50_000


def test_a_compressed_body_is_not_unpacked(service: Service) -> None:
    bomb = gzip.compress(b" " * 20_000_000)
    headers = {**JSON, "Content-Encoding": "gzip"}
    answer = service.client.post("/v1/jobs", content=bomb, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


def test_a_pattern_can_not_halt_the_service(service: Service) -> None:
    recipe = {"overrides": [{"match": "re:(.+)+!", "bits": 8}]}
    for route in ("/v1/jobs", "/v1/estimates"):
        answer = service.client.post(route, json={"model": MODEL, "recipe": recipe})
        assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
        ignoring = {"model": MODEL, "recipe": {"ignore": ["re:(.+)+!"]}}
        assert service.client.post(route, json=ignoring).status_code == 422


def test_keys_are_in_no_log_and_no_answer(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        service.submit()
        listed = service.client.get("/v1/keys").text
        wrong = service.client_with(ADMIN_KEY + "x")
        with wrong as client:
            refused = client.get("/v1/jobs").text
    assert ADMIN_KEY not in caplog.text
    assert ADMIN_KEY not in listed + refused


def test_secrets_are_in_no_command_line(redis_url: str, tmp_path: Path) -> None:
    """Of a worker, its supervisor and its child."""
    workshop = Workshop(connect(redis_url), redis_url, tmp_path / "state")
    job = workshop.submit(layers="6", pause="0.3")
    assert workshop.queue.enqueue(job)
    with workshop.worker("one"):
        while "checkpoint" not in workshop.kinds(job):
            pass
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    ours = [line for line in lines if b"child_start" in line or b"stand_in" in line]
    assert ours
    assert not [line for line in ours if redis_url.encode() in line or b"api-key" in line]
    workshop.redis.close()


def test_ids_never_become_paths(service: Service) -> None:
    for known in (
        "..%2f..%2fetc",
        "%2e%2e",
        "job_%00",
        "art_" + "A" * 300,
        "job_01M823S510D0DJEWVM94T0ZK2G%2f..",
    ):
        for route in ("/v1/jobs/{}", "/v1/artifacts/{}", "/v1/artifacts/{}/files/../manifest.json"):
            answer = service.client.get(route.format(known))
            assert answer.status_code in (404, 405), (route, known)
            assert answer.headers["content-type"] == "application/problem+json"
