"""Answers that are kept: true at every request, for everyone who may see them and no one else."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

import httpx
import pytest
from redis import Redis

from app.api.workers import list_workers
from app.core.access.api_keys import Scope
from app.core.changes.stamps import StampReader
from app.core.deployments.deployment import DeploymentSpec, Replica, ReplicaState
from app.core.deployments.deployment_store import DeploymentStore
from app.core.jobs.worker_registry import WorkerRecord, WorkerRegistry
from app.core.records.ids import new_id
from app.core.records.job import Progress
from tests.integration.api_service import ADMIN_KEY, MODEL, Service

LISTS = ("/v1/jobs", "/v1/jobs?view=brief&limit=5", "/v1/workers", "/v1/deployments")


class Dashboard:
    """Polls a path with its entity tag. The first two requests make the caller and the answer known."""

    def __init__(self, client: httpx.Client, path: str) -> None:
        self._client = client
        self._path = path
        self._tag: str | None = None
        for _ in range(4):
            self.poll()
        assert self.poll().status_code == 304

    def poll(self) -> httpx.Response:
        answer = self._client.get(self._path, headers={"If-None-Match": self._tag} if self._tag else {})
        self._tag = answer.headers.get("etag", self._tag)
        return answer


def worker(name: str) -> WorkerRecord:
    now = datetime.now(UTC)
    return WorkerRecord(name=name, host="h", pid=1, device="cpu", started_at=now, heartbeat_at=now)


def test_every_change_is_seen_by_the_next_poll(service: Service) -> None:
    job_id = service.submit()["id"]
    lists = [Dashboard(service.client, path) for path in LISTS[:2]]
    one = Dashboard(service.client, f"/v1/jobs/{job_id}")
    attempts = [
        lambda: service.claim(job_id),
        lambda: service.store.update(
            job_id, lambda job: job.model_copy(update={"progress": Progress(fraction=0.5)}), attempt=1
        ),
        lambda: service.client.post(f"/v1/jobs/{job_id}/cancel"),
    ]
    for change in attempts:
        change()
        assert [view.poll().status_code for view in (one, *lists)] == [200] * 3
        assert [view.poll().status_code for view in (one, *lists)] == [304] * 3
    newer = service.submit()["id"]
    assert [view.poll().json()["data"][0]["id"] for view in lists] == [newer] * 2
    assert one.poll().status_code == 304
    service.end(newer)
    service.client.delete(f"/v1/jobs/{newer}").raise_for_status()
    assert [view.poll().json()["data"][0]["id"] for view in lists] == [job_id] * 2


def test_polls_without_news_read_no_jobs(service: Service) -> None:
    def pages_read() -> int:
        found = service.redis.info("commandstats")["cmdstat_zrevrangebylex"]
        assert isinstance(found, dict)
        return int(found["calls"])

    service.submit()
    listed = Dashboard(service.client, "/v1/jobs")
    before = pages_read()
    assert [listed.poll().status_code for _ in range(10)] == [304] * 10
    assert pages_read() == before
    metrics = service.client.get("/metrics").text
    assert 'nibble_http_requests_total{method="GET",route="/v1/jobs",status="304"}' in metrics


def test_workers_and_deployments_are_seen_at_once(service: Service) -> None:
    store, registry = DeploymentStore(service.redis), WorkerRegistry(service.redis)
    workers = Dashboard(service.client, "/v1/workers")
    registry.beat(worker("a"), ttl_s=30)
    assert [found["name"] for found in workers.poll().json()["data"]] == ["a"]
    registry.remove("a")
    assert workers.poll().json()["data"] == []
    listed = Dashboard(service.client, "/v1/deployments")
    deployment = store.create("default", DeploymentSpec(artifact=new_id("art"), name="chat"))
    assert [found["state"] for found in listed.poll().json()["data"]] == ["starting"]
    one = Dashboard(service.client, f"/v1/deployments/{deployment.id}")
    replica = Replica(
        deployment=deployment.id, slot=0, owner="o", worker="w", engine="transformers",
        state=ReplicaState.READY, url="http://127.0.0.1:9", since=deployment.created_at,
    )  # fmt: skip
    store.beat(replica, ttl_s=30)
    assert (one.poll().json()["state"], listed.poll().json()["data"][0]["state"]) == ("ready", "ready")
    store.release(replica)
    assert (one.poll().json()["state"], listed.poll().json()["data"][0]["state"]) == ("starting", "starting")
    assert one.poll().headers["retry-after"] == "1"


def test_what_vanishes_without_a_word_is_missed_soon(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = vars(list_workers)
    monkeypatch.setitem(marks, "polled", marks["polled"]._replace(lasts_s=0.2))
    WorkerRegistry(service.redis).beat(worker("a"), ttl_s=30)
    workers = Dashboard(service.client, "/v1/workers")
    service.redis.delete("nibble:worker:a")  # as its expiry does
    deadline = time.monotonic() + 10
    while workers.poll().status_code == 304:
        assert time.monotonic() < deadline


def test_a_revoked_key_and_a_closed_session_are_refused_at_once(service: Service) -> None:
    made = service.client.post("/v1/keys", json={"scopes": ["jobs:read"]}).json()
    with service.client_with(made["key"]) as client, service.client_with(None) as browser:
        browser.get(client.post("/v1/login-links").json()["path"])
        views = [Dashboard(client, "/v1/jobs"), Dashboard(browser, "/v1/jobs")]
        browser.post("/v1/logout", headers={"Origin": service.url}).raise_for_status()
        assert [view.poll().status_code for view in views] == [304, 401]
        service.client.delete(f"/v1/keys/{made['id']}").raise_for_status()
        assert views[0].poll().json()["code"] == "api_key_unknown"


def test_an_answer_is_kept_for_its_tenant_and_scopes_only(service: Service) -> None:
    service.submit()
    for path in LISTS:
        Dashboard(service.client, path)
    lacking = service.key(Scope.INFERENCE)
    with service.client_with(lacking) as client:
        assert {client.get(path).status_code for path in LISTS * 4} == {403}
    with service.client_with(service.key(Scope.ADMIN, tenant="other")) as client:
        assert [client.get("/v1/jobs").json()["data"] for _ in range(4)] == [[]] * 4
    with service.client_with(ADMIN_KEY[:-1] + "x") as client:
        assert {client.get(path).status_code for path in LISTS * 4} == {401}


def test_an_expired_key_is_refused_though_its_answer_is_kept(service: Service) -> None:
    made = service.client.post("/v1/keys", json={"scopes": ["jobs:read"], "expires_in_s": 60}).json()
    name = f"nibble:key:{made['id']}"
    moment = datetime.fromtimestamp(time.time() + 1.5, UTC).isoformat().replace("+00:00", "Z")
    record = service.redis.get(name)
    assert made["expires_at"].encode() in record
    service.redis.set(name, record.replace(made["expires_at"].encode(), moment.encode()))
    with service.client_with(made["key"]) as client:
        deadline = time.monotonic() + 10
        while (answer := client.get("/v1/jobs")).status_code == 200:
            assert time.monotonic() < deadline
    assert answer.json()["code"] == "api_key_expired"


def test_a_tenants_rate_holds_for_polls_too(service: Service) -> None:
    with service.client_with(service.key(Scope.JOBS_READ, tenant="other")) as client:
        Dashboard(client, "/v1/jobs")
        service.client.put("/v1/tenants/other/limits", json={"requests_per_minute": 30})
        assert 429 in {client.get("/v1/jobs").status_code for _ in range(20)}


def test_a_wrong_query_and_a_foreign_name_are_refused_after_polls(service: Service) -> None:
    Dashboard(service.client, "/v1/jobs")
    assert service.client.get("/v1/jobs?page=2").status_code == 422
    assert service.client.get("/v1/jobs", headers={"Host": "evil.example"}).status_code == 403
    assert service.client.get("/v1/jobs/job_x").status_code == 404


def test_parallel_polls_of_a_changed_list_agree(service: Service) -> None:
    Dashboard(service.client, "/v1/jobs")
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}

    async def ask(client: httpx.AsyncClient) -> list[str]:
        answer = await client.get("/v1/jobs", headers=headers)
        return [job["id"] for job in answer.json()["data"]]

    async def ask_often() -> None:
        async with httpx.AsyncClient(base_url=service.url, trust_env=False, timeout=30) as client:
            for _ in range(5):
                made = (await client.post("/v1/jobs", json={"model": MODEL}, headers=headers)).json()["id"]
                found = await asyncio.gather(*[ask(client) for _ in range(10)])
                assert [ids[0] for ids in found] == [made] * 10

    asyncio.run(ask_often())


def test_reads_of_a_moment_go_together_and_see_what_was_written(redis: Redis, redis_url: str) -> None:
    redis.set("a", "1")
    redis.hset("nibble:job:x", "version", 7)

    async def read() -> None:
        reader = StampReader(redis_url)
        assert await reader.read(("a", "nibble:job:x", "b")) == (b"1", b"7", None)
        before = redis.info("commandstats")["cmdstat_evalsha"]["calls"]
        found = await asyncio.gather(*[reader.read(("a", f"n{number}")) for number in range(50)])
        assert found == [(b"1", None)] * 50
        assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] - before <= 2
        await reader.close()

    asyncio.run(read())
