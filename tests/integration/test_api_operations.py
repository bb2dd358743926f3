from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from app.core.access.api_keys import Scope, key_id
from app.core.deployments.deployment import DeploymentSpec
from app.core.deployments.deployment_store import DeploymentStore
from app.core.jobs.worker_registry import WorkerRecord, WorkerRegistry
from app.core.planning.device_profile import NOMINAL
from app.core.records.ids import new_id
from app.core.records.job import JobState, Problem
from app.core.redis.redis_server import resolve_redis
from app.core.settings import Settings
from app.core.telemetry.tally import Tally
from app.core.upkeep.janitor import STEPS
from tests.integration.api_service import ADMIN_KEY, EXAMPLES, MODEL, Service, running_service
from tests.waiting import wait_until

OPEN = {"/", "/healthz", "/readyz", "/metrics", "/openapi.json", "/login",
        "/v1/downloads/{artifact_id}/{path}"}  # fmt: skip
ANY_KEY = {"POST /v1/login-links", "POST /v1/logout", "GET /v1/whoami"}  # whatever its scopes
# What a key with just this scope may do.
ALLOWED = {
    Scope.JOBS_READ: {
        "GET /v1/jobs", "GET /v1/jobs/{job_id}", "GET /v1/jobs/{job_id}/events",
        "GET /v1/jobs/{job_id}/report", "POST /v1/estimates", "GET /v1/workers", "POST /v1/recommendations",
        "GET /v1/jobs/{job_id}/webhook-deliveries", "GET /v1/jobs/{job_id}/export",
        "GET /v1/webhook-deliveries",
        "GET /v1/datasets", "GET /v1/datasets/{dataset_id}", "GET /v1/sources",
    },
    Scope.JOBS_WRITE: {
        "POST /v1/jobs", "POST /v1/jobs/{job_id}/cancel", "POST /v1/jobs/{job_id}/retry",
        "POST /v1/datasets", "DELETE /v1/datasets/{dataset_id}",
        "DELETE /v1/jobs/{job_id}", "POST /v1/jobs/{job_id}/webhook-deliveries/{delivery_id}/redeliver",
    },
    Scope.ARTIFACTS_READ: {
        "GET /v1/artifacts", "GET /v1/artifacts/{artifact_id}",
        "GET /v1/artifacts/{artifact_id}/files/{path}", "POST /v1/artifacts/{artifact_id}/links",
        "GET /v1/artifacts/{artifact_id}/pushes/{push_id}", "GET /v1/registry",
    },
    Scope.ARTIFACTS_WRITE: {
        "DELETE /v1/artifacts/{artifact_id}", "PATCH /v1/artifacts/{artifact_id}",
        "POST /v1/artifacts/{artifact_id}/push",
    },
    Scope.DEPLOYMENTS_READ: {
        "GET /v1/deployments", "GET /v1/deployments/{deployment_id}", "GET /v1/scrape-targets",
        "GET /v1/deployments/{deployment_id}/servers/{slot}/metrics",
    },
    Scope.DEPLOYMENTS_WRITE: {
        "POST /v1/deployments", "PATCH /v1/deployments/{deployment_id}",
        "DELETE /v1/deployments/{deployment_id}",
    },
    Scope.INFERENCE: {
        "POST /v1/chat/completions", "POST /v1/completions", "GET /v1/models", "GET /v1/models/{name}",
        "POST /v1/responses", "POST /v1/messages", "POST /v1/messages/count_tokens", "POST /v1/embeddings",
        "POST /tokenize", "POST /detokenize",
    },
}  # fmt: skip


def operations(service: Service) -> Iterator[tuple[str, str]]:
    """Method and path template of each guarded route."""
    document = service.client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        if path not in OPEN:
            yield from ((method.upper(), path) for method in methods)


def called(service: Service, key: str | None, method: str, template: str) -> int:
    path = template.format(job_id=new_id("job"), artifact_id=new_id("art"), path="x", key_id="0" * 16,
                           delivery_id="msg_x", tenant="default", deployment_id=new_id("dep"), slot=0,
                           dataset_id=new_id("ds"), name="x", push_id=new_id("push"))  # fmt: skip
    body = {"model": MODEL} if method == "POST" else None
    with service.client_with(key) as client:
        return client.request(method, path, json=body).status_code


def test_no_route_of_v1_answers_without_a_known_key(service: Service) -> None:
    statuses = {
        called(service, key, method, path)
        for method, path in operations(service)
        for key in (None, "nib_0000000000000000_" + "0" * 64)
    }
    assert statuses == {401}


def test_each_scope_opens_its_routes_and_no_others(service: Service) -> None:
    for scope, expected in ALLOWED.items():
        key = service.key(scope)
        allowed = {
            f"{method} {path}"
            for method, path in operations(service)
            if called(service, key, method, path) != 403
        }
        assert allowed == expected | ANY_KEY


def test_a_refusal_names_the_scope(service: Service) -> None:
    with service.client_with(service.key(Scope.JOBS_READ)) as client:
        problem = client.post("/v1/jobs", json={"model": MODEL}).json()
    assert problem["code"] == "scope_missing"
    assert "jobs:write" in problem["remedy"]


def body_of(method: str, path: str) -> dict[str, Any] | None:
    """A body that the route accepts."""
    by_ending: dict[str, dict[str, Any]] = {
        "/push": {"repo_id": "team/model"}, "/links": {"path": "a"},
        "/{artifact_id}": {"tags": ["a"]}, "/{deployment_id}": {"replicas": 2},
    }  # fmt: skip
    own = next((body for ending, body in by_ending.items() if path.endswith(ending)), {})
    return own if method in ("POST", "PATCH") else None


def test_another_tenants_id_is_404_on_every_route(service: Service) -> None:
    """Each route of the description is called with ids that exist, by the admin of another tenant."""
    job_id = service.submit()["id"]
    service.end(job_id)
    service.objects.put(f"reports/{job_id}.json", b"{}")
    artifact = service.publish(job_id, {"a": b"1"})
    dataset = service.client.post("/v1/datasets", params={"name": "a.txt"}, content=b"text").json()
    own = {"job_id": job_id, "artifact_id": artifact.id, "path": "a", "key_id": key_id(ADMIN_KEY),
           "dataset_id": dataset["id"],
           "delivery_id": "msg_x", "name": "tiny", "slot": 0, "tenant": "default", "push_id": new_id("push"),
           "deployment_id": DeploymentStore(service.redis).create(
               "default", DeploymentSpec(artifact=artifact.id, name="tiny")).id}  # fmt: skip
    routes = [(method, path) for method, path in operations(service) if "{" in path]
    with service.client_with(service.key(Scope.ADMIN, tenant="other")) as client:
        statuses = {
            f"{method} {path}": client.request(
                method, path.format(**own), json=body_of(method, path)
            ).status_code
            for method, path in routes
        }
        assert client.get("/v1/jobs").json()["data"] == []
        assert client.get("/v1/artifacts").json()["data"] == []
    assert len(statuses) >= 10
    # Refused before anything is looked up: the scope is the operator's.
    assert statuses.pop("PUT /v1/tenants/{tenant}/limits") == 403
    assert {route: status for route, status in statuses.items() if status != 404} == {}
    assert service.client.get(f"/v1/artifacts/{artifact.id}/files/a").content == b"1"


def test_unknown_routes_and_methods_are_problems(service: Service) -> None:
    for method, path, status in (("GET", "/nope", 404), ("PUT", "/v1/jobs", 405)):
        answer = service.client.request(method, path)
        assert (answer.status_code, answer.json()["status"]) == (status, status)
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_large_body_is_refused_with_and_without_a_stated_length(service: Service) -> None:
    body = json.dumps({"model": MODEL, "calibration": {"texts": ["x" * 200_000]}}).encode()
    pieces = (body[start : start + 10_000] for start in range(0, len(body), 10_000))
    headers = {"Content-Type": "application/json"}
    for content in (body, pieces):
        answer = service.client.post("/v1/jobs", content=content, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


def test_every_answer_carries_a_request_id(service: Service) -> None:
    given = service.client.get("/healthz", headers={"X-Request-ID": "abc-1"})
    made = service.client.get("/healthz", headers={"X-Request-ID": "no spaces please"})
    assert given.headers["x-request-id"] == "abc-1"
    assert len(made.headers["x-request-id"]) == 16
    assert made.headers["x-content-type-options"] == "nosniff"


def test_health_index_and_description_need_no_key(service: Service) -> None:
    with service.client_with(None) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/readyz").json()["checks"] == {"redis": "ok", "storage": "ok"}
        assert client.get("/").json()["service"] == "nibble"
        assert client.get("/openapi.json").json()["info"]["title"] == "Nibble"


def metric(service: Service, name: str) -> float:
    lines = service.client.get("/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(name + " ")))


def test_metrics_tell_of_jobs_queues_and_requests(service: Service) -> None:
    service.submit()
    service.end(service.submit()["id"])
    assert metric(service, 'nibble_jobs{state="queued"}') == 1
    assert metric(service, 'nibble_jobs{state="succeeded"}') == 1
    assert metric(service, 'nibble_queue_depth{queue="nibble-normal"}') == 2
    assert metric(service, 'nibble_workers{state="idle"}') == 0
    failed = service.submit()["id"]
    service.end(failed, JobState.FAILED, error=Problem(code="out_of_memory", message="x"))
    Tally(service.redis).add_stage("searching", 1.5)
    now = datetime.now(UTC)
    worker = WorkerRecord(
        name="a", host="h", pid=1, device="cuda:0", memory_bytes=7, started_at=now, heartbeat_at=now
    )
    WorkerRegistry(service.redis).beat(worker, ttl_s=30)
    assert metric(service, "nibble_queue_oldest_seconds") > 0
    assert metric(service, 'nibble_job_failures_total{code="out_of_memory"}') == 1
    assert metric(service, 'nibble_stage_seconds_sum{stage="searching"}') == 1.5
    assert metric(service, 'nibble_stage_seconds_count{stage="searching"}') == 1
    assert 0 <= metric(service, 'nibble_worker_heartbeat_age_seconds{worker="a"}') < 30
    assert metric(service, 'nibble_gpu_memory_used_bytes{worker="a"}') == 7
    service.client.get(f"/v1/jobs/{new_id('job')}")
    service.client.get("/no/such/route")
    counted = 'nibble_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"}'
    assert metric(service, counted) == 1
    assert metric(service, 'nibble_http_requests_total{method="GET",route="unmatched",status="404"}') == 1
    assert {
        step: metric(service, f'nibble_janitor_steps_total{{step="{step}"}}') for step in STEPS
    } == dict.fromkeys(STEPS, 0)


def test_records_of_a_newer_version_hide_no_others(service: Service) -> None:
    now, store = datetime.now(UTC), DeploymentStore(service.redis)
    fields: dict[str, Any] = {"host": "h", "pid": 1, "started_at": now, "heartbeat_at": now, "device": "cpu"}
    for name in ("known", "newer"):
        WorkerRegistry(service.redis).beat(WorkerRecord(name=name, **fields), ttl_s=30)
        store.create("default", DeploymentSpec(artifact=new_id("art"), name=name))
    newer = next(live.id for live in store.all() if live.spec.name == "newer")
    worker, key = service.redis.get("nibble:worker:newer"), f"nibble:deployment:{newer}"
    service.redis.set("nibble:worker:newer", worker.replace(b'"jobs"', b'"prune"'))
    deployment = service.redis.hget(key, "record")
    service.redis.hset(key, "record", deployment.replace(b'"name":', b'"mirrors":2,"name":'))
    for route in ("workers", "deployments"):
        wait_until(lambda route=route: len(service.client.get(f"/v1/{route}").json()["data"]) == 1)
        (shown,) = service.client.get(f"/v1/{route}").json()["data"]
        assert shown["name"] == "known"
    answer = service.client.get(f"/v1/deployments/{newer}")
    assert (answer.status_code, answer.json()["code"]) == (503, "record_unreadable")
    assert service.client.get("/metrics").status_code == 200


def test_living_workers_are_listed_and_hide_other_tenants_jobs(service: Service) -> None:
    now = datetime.now(UTC)
    registry = WorkerRegistry(service.redis)
    fields: dict[str, Any] = {"host": "h", "pid": 1, "started_at": now, "heartbeat_at": now}
    mine = WorkerRecord(name="a", device="cpu", job=new_id("job"), tenant="default", **fields)
    profile = NOMINAL["cuda"].model_copy(update={"assumed": ()})
    foreign = WorkerRecord(
        name="b", device="cuda:0", job=new_id("job"), tenant="other", profile=profile, **fields
    )
    for worker in (mine, foreign):
        registry.beat(worker, ttl_s=30)
    listed = service.client.get("/v1/workers").json()["data"]
    assert [(worker["name"], worker["state"], worker["rates"], worker["job"]) for worker in listed] == [
        ("a", "busy", "nominal", mine.job), ("b", "busy", "measured", None),
    ]  # fmt: skip
    estimate = service.client.post("/v1/estimates", json={"model": MODEL}).json()
    assert (estimate["device"], estimate["basis"]) == ("cuda", "measured")
    registry.remove("a")
    registry.remove("b")
    assert service.client.get("/v1/workers").json()["data"] == []


def test_without_redis_the_service_answers_503_and_recovers(tmp_path: Path) -> None:
    own = Settings(state_dir=tmp_path / "redis")
    server = resolve_redis(own)
    settings = Settings(
        state_dir=tmp_path / "state",
        redis_url=server.url,
        model_roots=(EXAMPLES,),
        bootstrap_api_key=ADMIN_KEY,
    )
    with running_service(settings) as service:
        job_id = service.submit()["id"]
        server.stop()
        refused = service.client.post("/v1/jobs", json={"model": MODEL})
        ready = service.client.get("/readyz")
        assert service.client.get("/healthz").status_code == 200
        with resolve_redis(own):
            assert service.client.get(f"/v1/jobs/{job_id}").json()["id"] == job_id
            assert service.client.get("/readyz").status_code == 200
    assert (refused.status_code, refused.json()["code"]) == (503, "redis_unavailable")
    assert refused.headers["retry-after"]
    assert (ready.status_code, ready.json()["checks"]["storage"]) == (503, "ok")
    assert ready.json()["checks"]["redis"].startswith("failed")


def test_without_storage_the_service_is_not_ready(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("ENDPOINT_URL", "http://127.0.0.1:9"),
        ("ACCESS_KEY_ID", "x"),
        ("SECRET_ACCESS_KEY", "x"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    settings = Settings(
        state_dir=tmp_path, redis_url=redis_url, storage_url="s3://bucket", bootstrap_api_key=ADMIN_KEY
    )
    with running_service(settings) as service:
        ready = service.client.get("/readyz")
        listed = service.client.get("/v1/artifacts")
    assert (ready.status_code, ready.json()["checks"]["redis"]) == (503, "ok")
    assert (listed.status_code, listed.json()["code"]) == (503, "storage_unavailable")


def test_browsers_get_the_dashboard_under_a_strict_policy(service: Service) -> None:
    page = service.client.get("/", headers={"Accept": "text/html"})
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    with service.client_with(None) as stranger:
        reference = stranger.get("/docs")
    assert (reference.status_code, reference.headers["content-security-policy"]) == (200, policy)
    assert service.client.get("/").json()["links"]["docs"] == "/docs"
    script = service.client.get("/assets/main.js")
    assert script.headers["content-type"].startswith("text/javascript")
    tag = {"If-None-Match": script.headers["etag"]}
    assert service.client.get("/assets/main.js", headers=tag).status_code == 304
    assert service.client.get("/assets/../../core/settings.py").status_code == 404


def test_no_page_names_another_host(repository: Path) -> None:
    for path in (repository / "app" / "dashboard").rglob("*"):
        if path.suffix in (".html", ".css", ".js") and path.parent.name != "vendor":
            hosts = re.findall(r"https?://[^\s\"'`]+", path.read_text())
            assert [host for host in hosts if not host.startswith("http://www.w3.org/")] == [], path
