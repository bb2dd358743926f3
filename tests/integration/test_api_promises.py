"""What callers may rely on, sentence by sentence, where no other file has it.

Elsewhere: keys of idempotency (test_api_jobs), resumed streams (test_api_events), waits and entity tags
(test_api_jobs, test_polled_answers), quotas, deadlines, reuse and the audit log (test_api_limits), webhooks
(test_webhooks), tenants, keys, sessions and origins (test_api_operations, test_api_keys).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from redis import Redis
from rq import Queue

from app.cli import main
from app.core.access.api_keys import Scope
from app.core.access.idempotency import IdempotencyKeys
from app.core.deployments.deployment import DeploymentSpec
from app.core.deployments.deployment_store import DeploymentStore
from app.core.jobs.job_queue import QUEUE_NAMES, SERIALIZER, JobQueue
from app.core.jobs.job_store import JobStore
from app.core.records.ids import new_id
from app.core.records.job import Job, JobState
from app.core.records.specs import JobSpec
from tests.integration.api_service import ADMIN_KEY, MODEL, Service


def test_posts_without_a_key_are_requests_of_their_own(service: Service) -> None:
    assert service.submit()["id"] != service.submit()["id"]


def test_a_key_belongs_to_its_tenant(service: Service) -> None:
    headers = {"Idempotency-Key": "k"}
    mine = service.client.post("/v1/jobs", json={"model": MODEL}, headers=headers)
    with service.client_with(service.key(Scope.ADMIN, tenant="other")) as client:
        theirs = client.post("/v1/jobs", json={"model": MODEL, "priority": "low"}, headers=headers)
    assert (mine.status_code, theirs.status_code) == (202, 202)
    assert mine.json()["id"] != theirs.json()["id"]


def test_a_request_that_died_half_way_is_completed_by_its_repetition(service: Service) -> None:
    """In flight, the key has the id of its job, and the job has no record yet."""
    spec = JobSpec.model_validate({"model": MODEL})
    job_id = IdempotencyKeys(service.redis).claim("default", "k", spec.model_dump_json(), new_id("job"))
    headers = {"Idempotency-Key": "k"}
    again = [service.client.post("/v1/jobs", json={"model": MODEL}, headers=headers) for _ in range(2)]
    assert [(answer.status_code, answer.json()["id"]) for answer in again] == [(202, job_id), (200, job_id)]
    assert sum(service.queue.depths().values()) == 1


def test_a_retry_with_a_key_is_made_once(service: Service) -> None:
    first, second = service.submit()["id"], service.submit()["id"]
    service.end(first, JobState.FAILED)
    service.end(second, JobState.FAILED)
    headers = {"Idempotency-Key": "k"}
    made = [service.client.post(f"/v1/jobs/{first}/retry", headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in made] == [202, 200]
    assert made[0].json()["id"] == made[1].json()["id"]
    other = service.client.post(f"/v1/jobs/{second}/retry", headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    invalid = service.client.post(f"/v1/jobs/{second}/retry", headers={"Idempotency-Key": ""})
    assert (invalid.status_code, invalid.json()["code"]) == (400, "idempotency_key_invalid")


def test_the_server_sets_the_interval_of_polls_with_and_without_news(service: Service) -> None:
    job_id = service.submit()["id"]
    told = []
    for change in (None, service.claim, lambda known: service.client.post(f"/v1/jobs/{known}/cancel")):
        if change is not None:
            change(job_id)
        first = service.client.get(f"/v1/jobs/{job_id}")
        same = service.client.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": first.headers["etag"]})
        assert (first.status_code, same.status_code) == (200, 304)
        told.append((first.headers["retry-after"], same.headers["retry-after"]))
    assert told == [("5", "5"), ("2", "2"), ("1", "1")]


def make_deployment(service: Service, number: int) -> object:
    spec = DeploymentSpec(artifact=new_id("art"), name=f"d{number}")
    return DeploymentStore(service.redis).create("default", spec)


LISTS: dict[str, Callable[[Service, int], object]] = {
    "/v1/jobs": lambda service, number: service.submit(),
    "/v1/artifacts": lambda service, number: service.publish(service.submit()["id"], {"a": b"1"}),
    "/v1/deployments": make_deployment,
    "/v1/audit": lambda service, number: service.client.post("/v1/logout"),
}


@pytest.mark.parametrize("route", LISTS)
def test_pages_miss_and_repeat_nothing_while_others_are_made(service: Service, route: str) -> None:
    make = LISTS[route]
    for number in range(5):
        make(service, number)
    whole = [item["id"] for item in service.client.get(route).json()["data"]]
    assert len(whole) >= 5
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    for number in range(10, 20):
        page = service.client.get(route, params=query).json()
        seen += [item["id"] for item in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = page["next"]
        make(service, number)
    assert seen == whole


def test_workers_take_urgent_jobs_first_and_older_ones_before_newer(redis: Redis) -> None:
    store, queue, made = JobStore(redis), JobQueue(redis, limit=20), {}
    for name, priority in (("a", "low"), ("b", "normal"), ("c", "high"), ("d", "normal"), ("e", "high")):
        spec = JobSpec.model_validate({"model": "org/name", "priority": priority})
        job = Job(id=new_id("job"), tenant="t", spec=spec, created_at=datetime.now(UTC))
        store.create(job)
        queue.enqueue(job)
        made[job.id] = name
    queues = [Queue(name, connection=redis, serializer=SERIALIZER) for name in QUEUE_NAMES]
    taken = [Queue.dequeue_any(queues, None, connection=redis, serializer=SERIALIZER) for _ in made]
    assert "".join(made[found[0].args[0]] for found in taken if found is not None) == "cebda"


def nibble(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code in (None, 0)


def test_the_terminal_prints_a_key_once_lists_and_revokes_it(
    service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIBBLE_URL", service.url)
    monkeypatch.setenv("NIBBLE_API_KEY", ADMIN_KEY)
    nibble("keys", "create", "--tenant", "search", "--scopes", "jobs:read,jobs:write", "--days", "1")
    key = capsys.readouterr().out.strip()
    with service.client_with(key) as client:
        assert client.get("/v1/jobs").status_code == 200
        nibble("keys", "list", "--tenant", "search", "--json")
        listed = capsys.readouterr().out
        (found,) = json.loads(listed)["data"]
        assert key not in listed
        assert found["scopes"] == ["jobs:read", "jobs:write"]
        assert found["last_used_at"] is not None
        assert found["expires_at"] is not None
        nibble("keys", "revoke", found["id"], "--yes")
        assert client.get("/v1/jobs").status_code == 401
