"""Quotas, rates, deadlines of the queue, reuse of what was made, and the record of who did what."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from redis import Redis

from app.core.access.api_keys import Scope, key_id
from app.core.access.limits import Limits
from app.core.jobs.job_queue import Place
from app.core.jobs.turns import Turns
from app.core.records.ids import new_id
from app.core.records.job import JobState, transition
from app.core.storage.reuse import JobResult, ReuseIndex
from app.core.upkeep.janitor import Janitor
from tests.integration.api_service import ADMIN_KEY, MODEL, Service
from tests.integration.workshop import Workshop
from workers.attempts.attempt import give_turn


def limit(service: Service, **limits: int) -> dict[str, Any]:
    answer = service.client.put("/v1/tenants/default/limits", json=limits)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


def test_a_tenant_has_no_more_active_jobs_than_it_may(service: Service) -> None:
    limit(service, active_jobs=3)

    def submit(_: int) -> int:
        return service.client.post("/v1/jobs", json={"model": MODEL}).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = sorted(pool.map(submit, range(8)))
    assert statuses == [202] * 3 + [429] * 5
    refused = service.client.post("/v1/jobs", json={"model": MODEL})
    assert refused.json()["code"] == "job_quota_exceeded"
    assert refused.headers["retry-after"]
    jobs = service.client.get("/v1/jobs").json()["data"]
    service.client.post(f"/v1/jobs/{jobs[0]['id']}/cancel")
    service.end(jobs[1]["id"])
    usage = service.client.get("/v1/tenants/default/limits").json()["usage"]
    assert usage["active_jobs"] == 1
    with service.client_with(service.key(Scope.ADMIN, tenant="other")) as other:
        assert other.post("/v1/jobs", json={"model": MODEL}).status_code == 202


def waits(service: Service, job_id: str) -> bool:
    """True if the job is in no queue, but in its tenant's line."""
    job = service.store.load(job_id)
    assert job.state is JobState.QUEUED
    is_queued = service.queue.locate(job) is Place.WAITING
    assert is_queued is not service.store.is_in_line(job)
    return not is_queued


def test_jobs_beyond_a_tenants_turns_wait_without_holding_up_others(service: Service) -> None:
    limit(service, running_jobs=2)
    first, second, third, fourth = (service.submit()["id"] for _ in range(4))
    urgent = service.submit(priority="high")["id"]
    with service.client_with(service.key(Scope.ADMIN, tenant="other")) as client:
        other = client.post("/v1/jobs", json={"model": MODEL}).json()["id"]
    assert [waits(service, one) for one in (first, second, third, fourth, urgent, other)] == [
        False, False, True, True, True, False,
    ]  # fmt: skip
    notes = [event for event in service.store.events(third) if event.kind == "note"]
    assert [event.payload["code"] for event in notes] == ["waits_for_turn"]
    usage = service.client.get("/v1/tenants/default/limits").json()["usage"]
    assert (usage["active_jobs"], usage["running_jobs"]) == (5, 2)
    service.client.post(f"/v1/jobs/{first}/cancel").raise_for_status()
    assert [waits(service, one) for one in (third, fourth, urgent)] == [True, True, False]
    service.client.post(f"/v1/jobs/{third}/cancel").raise_for_status()
    limit(service, running_jobs=0)
    assert not waits(service, fourth)


def test_turns_that_nobody_gave_are_given_by_a_sweep(service: Service, janitor: Janitor) -> None:
    limit(service, running_jobs=1)
    first, second = service.submit()["id"], service.submit()["id"]
    janitor.sweep()
    assert waits(service, second)
    service.claim(first)  # by a worker that died before it gave the turn
    service.store.update(first, lambda job: transition(job, JobState.SUCCEEDED), attempt=1)
    assert waits(service, second)
    Turns(service.store, service.queue, lambda tenant: 1).sweep()
    assert not waits(service, second)


def test_parallel_submissions_keep_to_the_turns(service: Service) -> None:
    limit(service, running_jobs=2)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: service.submit()["id"], range(10)))
    assert sorted(waits(service, job_id) for job_id in made) == [False] * 2 + [True] * 8
    for _ in range(7):
        running = next(job_id for job_id in service.store.in_state(JobState.QUEUED)
                       if not waits(service, job_id))  # fmt: skip
        service.client.post(f"/v1/jobs/{running}/cancel").raise_for_status()
    assert sum(service.queue.depths().values()) == 2


def queued(service: Service) -> list[str]:
    """The jobs in the queue of normal priority, in order."""
    entries: Any = service.redis.lrange("rq:queue:nibble-normal", 0, -1)
    return [entry.decode().rpartition("-")[0] for entry in entries]


def test_the_queue_has_the_tenants_in_turn(service: Service, redis_url: str, tmp_path: Path) -> None:
    """However many jobs a tenant sends: another one's is behind two of them."""
    many = [service.submit()["id"] for _ in range(5)]
    with service.client_with(service.key(Scope.ADMIN, tenant="other")) as client:
        few = [client.post("/v1/jobs", json={"model": MODEL}).json()["id"] for _ in range(2)]
    urgent = service.submit(priority="high")["id"]
    assert queued(service) == [*many[:2], *few]
    assert not waits(service, urgent)  # each priority has places of its own
    assert all(event.kind != "note" for event in service.store.events(many[4]))
    workshop = Workshop(service.redis, redis_url, tmp_path / "workshop")
    service.redis.lpop("rq:queue:nibble-normal")
    service.claim(many[0])
    give_turn(workshop.context(), "default")
    assert queued(service) == [many[1], *few, many[2]]
    service.client.post(f"/v1/jobs/{many[1]}/cancel").raise_for_status()
    assert queued(service) == [*few, many[2], many[3]]
    assert waits(service, many[4])
    assert service.client.get("/v1/tenants/default/limits").json()["usage"]["running_jobs"] == 4


def test_with_many_workers_a_tenant_has_more_places(service: Service) -> None:
    """Claims follow each other too slowly for two places to fill them."""
    service.redis.zadd("nibble:workers", {f"w{number}": 1e12 for number in range(100)})
    made = [service.submit()["id"] for _ in range(5)]
    assert queued(service) == made[:3]


def test_a_place_whose_job_an_earlier_version_took_is_given(service: Service) -> None:
    first, second, third = (service.submit()["id"] for _ in range(3))
    service.claim(first)
    service.redis.zadd("nibble:line:default", {first: 11})  # as it stays there without the mark of its end
    assert waits(service, third)
    turns = Turns(service.store, service.queue, lambda tenant: 0)
    turns.sweep()
    assert not waits(service, third)
    for job_id in (second, third):
        service.claim(job_id)
    assert service.redis.smembers("nibble:lines") == {b"default"}
    turns.sweep()
    assert service.redis.smembers("nibble:lines") == set()


def test_the_end_of_an_attempt_gives_the_turn(redis: Redis, redis_url: str, tmp_path: Path) -> None:
    workshop = Workshop(redis, redis_url, tmp_path / "state")
    workshop.context().limits.set("default", Limits(running_jobs=1))
    first = workshop.submit()
    second = first.model_copy(update={"id": new_id("job")})
    workshop.store.create(second, most_turns=1)
    assert workshop.store.is_in_line(second)
    assert workshop.run(first).state is JobState.SUCCEEDED
    assert workshop.queue.locate(second) is Place.WAITING
    assert workshop.run(second).state is JobState.SUCCEEDED


def test_a_tenant_that_fills_its_storage_submits_nothing(service: Service) -> None:
    job_id = service.submit()["id"]
    artifact = service.publish(job_id, {"a": b"12345678"})
    limit(service, storage_bytes=8)
    service.redis.hset("nibble:usage:default", artifact.id, 8)
    refused = service.client.post("/v1/jobs", json={"model": MODEL})
    assert (refused.status_code, refused.json()["code"]) == (429, "storage_quota_exceeded")
    service.client.delete(f"/v1/artifacts/{artifact.id}")
    service.submit()


def test_requests_beyond_the_rate_are_told_when_to_come_back(service: Service) -> None:
    with service.client_with(service.key(Scope.ADMIN, tenant="other")) as client:
        service.client.put("/v1/tenants/other/limits", json={"requests_per_minute": 30})
        answers = [client.get("/v1/jobs") for _ in range(12)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert answers[0].status_code == 200
    assert refused[0].json()["code"] == "rate_limited"
    assert 1 <= int(refused[0].headers["retry-after"]) <= 3
    assert service.client.get("/v1/jobs").status_code == 200


def test_the_rate_holds_for_inference_routes(service: Service) -> None:
    with service.client_with(service.key(Scope.INFERENCE, tenant="other")) as client:
        assert {client.get("/v1/models").status_code for _ in range(20)} == {200}
        service.client.put("/v1/tenants/other/limits", json={"requests_per_minute": 30})
        answers = [client.get("/v1/models") for _ in range(12)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    error = refused[0].json()["error"]
    assert (error["code"], error["type"]) == ("rate_limited", "rate_limit_error")
    assert 1 <= int(refused[0].headers["retry-after"]) <= 3


def test_only_the_operator_sets_limits(service: Service) -> None:
    with service.client_with(service.key(Scope.ADMIN, tenant="other")) as client:
        assert client.put("/v1/tenants/other/limits", json={}).json()["code"] == "scope_missing"
        assert client.get("/v1/tenants/other/limits").json()["limits"]["active_jobs"] == 0
        assert client.get("/v1/tenants/default/limits").status_code == 404


def test_every_change_is_in_the_audit_log(service: Service) -> None:
    headers = {"X-Request-ID": "req-1"}
    job_id = service.client.post("/v1/jobs", json={"model": MODEL}, headers=headers).json()["id"]
    service.client.get(f"/v1/jobs/{job_id}")
    service.client.post("/v1/estimates", json={"model": MODEL})
    service.client.delete(f"/v1/jobs/{job_id}")
    service.client.post("/v1/jobs", json={})
    page = service.client.get("/v1/audit", params={"limit": 2}).json()
    rest = service.client.get("/v1/audit", params={"after": page["next"]}).json()
    told = [(entry["method"], entry["path"], entry["status"]) for entry in page["data"] + rest["data"]]
    assert told == [
        ("POST", "/v1/jobs", 422), ("DELETE", f"/v1/jobs/{job_id}", 409), ("POST", "/v1/jobs", 202),
    ]  # fmt: skip
    assert service.client.get("/v1/audit?after=0-0").json()["data"] == []
    first = rest["data"][0]
    assert (first["request_id"], first["key_id"]) == ("req-1", key_id(ADMIN_KEY))
    with service.client_with(service.key(Scope.ADMIN, tenant="other")) as other:
        assert other.get("/v1/audit").json()["data"] == []


@pytest.fixture
def janitor(service: Service) -> Janitor:
    return service.janitor


def age(service: Service, job_id: str, seconds: int) -> None:
    """Have the job been recorded so long ago, as Redis sees it."""
    name = f"nibble:events:{job_id}"
    first = service.redis.xrange(name, count=1)[0]
    service.redis.delete(name)
    moment = int(first[0].partition(b"-")[0]) - seconds * 1000
    service.redis.xadd(name, first[1], id=f"{moment}-0")


def test_a_job_that_waits_too_long_fails(
    service: Service, janitor: Janitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, begun = service.submit(queue_timeout_s=60)["id"], service.submit(queue_timeout_s=60)["id"]
    patient = service.submit()["id"]
    service.claim(begun)
    janitor.sweep()
    assert service.store.load(late).state is JobState.QUEUED
    for job_id in (late, patient, begun):
        age(service, job_id, 61)
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 61)
    monkeypatch.setattr("app.core.upkeep.janitor.time", later)
    janitor.sweep()
    ended = service.store.load(late)
    assert ended.error is not None
    assert (ended.state, ended.error.code) == (JobState.FAILED, "queue_deadline_exceeded")
    assert service.queue.locate(ended) is Place.GONE
    assert service.store.load(patient).state is JobState.QUEUED
    assert service.store.load(begun).state is JobState.RUNNING


def made_job(service: Service) -> tuple[str, str]:
    """A job that has ended with an artifact, as a worker leaves it; both ids."""
    job_id = service.submit()["id"]
    artifact = service.publish(job_id, {"a": b"1"})
    service.end(job_id, artifacts=(artifact.id,))
    service.objects.put(f"reports/{job_id}.json", b'{"version": 1}')
    known = service.store.load(job_id).fingerprint
    assert known is not None
    made = JobResult(job=job_id, artifacts=(artifact.id,))
    ReuseIndex(service.redis, service.objects).note("default", known, made)
    return job_id, artifact.id


def test_the_same_contents_give_the_same_artifact(service: Service) -> None:
    first, artifact = made_job(service)
    again = service.submit(labels={"other": "label"}, priority="low", timeout_s=60)
    assert (again["state"], again["artifacts"], again["reused_from"]) == ("succeeded", [artifact], first)
    assert service.client.get(f"/v1/jobs/{again['id']}/report").json() == {"version": 1}
    assert service.queue.locate(service.store.load(again["id"])) is Place.GONE
    deployed = service.submit(deploy={"name": "again"})
    views = service.client.get("/v1/deployments").json()["data"]
    assert [(view["name"], view["artifact"], view["job"]) for view in views] == [
        ("again", artifact, deployed["id"])
    ]
    assert service.submit(force=True)["state"] == "queued"
    assert service.submit(recipe={"bits": 8})["state"] == "queued"
    assert service.submit(calibration={"seed": 1})["state"] == "queued"
    with service.client_with(service.key(Scope.ADMIN, tenant="other")) as other:
        assert other.post("/v1/jobs", json={"model": MODEL}).json()["state"] == "queued"


def test_what_was_deleted_is_made_again(service: Service) -> None:
    _, artifact = made_job(service)
    service.client.delete(f"/v1/artifacts/{artifact}")
    assert service.submit()["state"] == "queued"


def test_a_worker_finds_what_was_made_of_the_same_digests(
    redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    workshop = Workshop(redis, redis_url, tmp_path / "state")
    first = workshop.run(workshop.submit())
    again = workshop.run(workshop.record(first.spec.model_copy(update={"force": False})))
    assert (again.state, again.artifacts, again.reused_from) == (
        JobState.SUCCEEDED, first.artifacts, first.id,
    )  # fmt: skip
    assert workshop.kinds(again).count("checkpoint") == 0
    assert workshop.payload(again, "note")["code"] == "reused"
    manifest = workshop.manifest(first)
    assert manifest is not None
    used = workshop.redis.hgetall("nibble:usage:default")
    assert used == {manifest.id.encode(): str(manifest.size).encode()}
    assert workshop.run(workshop.submit()).artifacts != first.artifacts
