"""What operators ask: settings, storage, the tenant's webhooks, and a log of changes that can be searched."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from app.core.access.api_keys import Scope, key_id
from app.core.access.audit_log import BATCH, AuditLog
from app.core.changes.redis_keys import tenant_deliveries_key
from app.core.outgoing.webhook_messages import MAX_OF_TENANT, DeliveryStore
from app.core.records.ids import new_id
from app.core.settings import Settings
from tests.integration.api_service import ADMIN_KEY, MODEL, Service

HOOK = {"url": "https://93.184.215.14/jobs", "events": ["job.started", "job.succeeded"]}


def read(service: Service, path: str, **query: object) -> dict[str, Any]:
    answer = service.client.get(f"/v1/{path}", params=query)  # type: ignore[arg-type]  # httpx writes any value
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


def test_settings_in_force_are_for_operators_and_without_secrets(service: Service) -> None:
    text = service.client.get("/v1/settings").text
    settings = {each["name"]: each for each in read(service, "settings")["data"]}
    assert set(settings) == {f"NIBBLE_{field.upper()}" for field in Settings.model_fields}
    assert ADMIN_KEY not in text
    assert settings["NIBBLE_BOOTSTRAP_API_KEY"]["value"] == "***"
    assert settings["NIBBLE_BOOTSTRAP_API_KEY"]["is_set"] is True
    assert settings["NIBBLE_STATE_DIR"]["value"] == str(service.settings.state_dir)
    assert (settings["NIBBLE_MAX_ATTEMPTS"]["value"], settings["NIBBLE_MAX_ATTEMPTS"]["is_set"]) == (
        "3",
        False,
    )
    assert settings["NIBBLE_HUB_TOKEN"]["value"] is None
    with service.client_with(service.key(Scope.ADMIN, tenant="team")) as client:
        assert client.get("/v1/settings").json()["code"] == "scope_missing"


def test_what_a_tenant_stores(service: Service) -> None:
    assert read(service, "storage")["is_complete"] is False
    service.client.post("/v1/gc")
    job_id = service.submit()["id"]
    service.end(job_id)
    manifest = service.publish(job_id, {"a": b"12345"})
    dataset = service.client.post("/v1/datasets", params={"name": "a.txt"}, content=b"some text").json()
    service.client.post("/v1/gc")  # counts the artifact, which no worker has
    stored = read(service, "storage")
    assert stored["is_complete"] is True
    assert stored["artifacts"] == {"count": 1, "bytes": manifest.size}
    assert stored["datasets"] == {"count": 1, "bytes": dataset["size"]}
    with service.client_with(service.key(Scope.ADMIN, tenant="team")) as client:
        assert client.get("/v1/storage").json()["artifacts"] == {"count": 0, "bytes": 0}


def test_a_dry_run_says_how_much_would_be_freed(service: Service) -> None:
    service.objects.put(f"checkpoints/{new_id('job')}/layer-0", b"x" * 1000)
    dry = service.client.post("/v1/gc", params={"dry_run": True}).json()
    assert (len(dry["checkpoints"]), dry["bytes"]) == (1, 1000)
    done = service.client.post("/v1/gc").json()
    assert (done["checkpoints"], done["bytes"]) == (dry["checkpoints"], None)


def test_the_webhooks_of_all_jobs_newest_first(service: Service) -> None:
    jobs = [service.submit(webhook=HOOK)["id"] for _ in range(2)]
    for job in jobs:
        service.end(job)
    service.end(service.submit()["id"])  # without a webhook
    page = read(service, "webhook-deliveries", limit=3)
    assert [(each["job"], each["type"]) for each in page["data"]] == [
        (jobs[1], "job.succeeded"), (jobs[1], "job.started"), (jobs[0], "job.succeeded"),
    ]  # fmt: skip
    rest = read(service, "webhook-deliveries", after=page["next"])
    assert [(each["job"], each["type"]) for each in rest["data"]] == [(jobs[0], "job.started")]
    assert (rest["has_more"], rest["next"]) == (False, None)
    own = read(service, f"jobs/{jobs[0]}/webhook-deliveries")["data"]
    assert own[-1]["id"] == page["data"][2]["id"]
    with service.client_with(service.key(Scope.JOBS_READ, tenant="team")) as client:
        assert client.get("/v1/webhook-deliveries").json()["data"] == []
    wrong = service.client.get("/v1/webhook-deliveries", params={"after": "job_1"})
    assert (wrong.status_code, wrong.json()["code"]) == (400, "invalid_cursor")


def test_webhooks_are_chosen_by_state_and_the_oldest_leave_the_list(service: Service) -> None:
    jobs = [service.submit(webhook=HOOK)["id"] for _ in range(2)]
    for job in jobs:
        service.end(job)
    store = DeliveryStore(service.redis)
    failed = store.list(jobs[0])[0].model_copy(update={"state": "failed"})
    store.write(failed, again_in_s=None)
    assert [each["job"] for each in read(service, "webhook-deliveries", state="failed")["data"]] == [jobs[0]]
    # As if there were more than can be listed: the next one takes the oldest's place.
    name = tenant_deliveries_key("default")
    service.redis.zadd(name, {f"msg_{number:026}": 0 for number in range(MAX_OF_TENANT)})
    service.end(service.submit(webhook=HOOK)["id"])
    assert service.redis.zcard(name) == MAX_OF_TENANT
    assert service.redis.zscore(name, failed.id) is not None
    assert service.redis.zscore(name, f"msg_{0:026}") is None


def test_the_audit_log_is_searched(service: Service) -> None:
    key = service.key(Scope.JOBS_WRITE)
    with service.client_with(key) as client:
        job_id = client.post("/v1/jobs", json={"model": MODEL}).json()["id"]
        client.post("/v1/keys", json={"scopes": ["jobs:read"]})  # refused
    service.client.post(f"/v1/jobs/{job_id}/cancel")
    told = [(each["method"], each["path"]) for each in read(service, "audit", key=key_id(key))["data"]]
    assert told == [("POST", "/v1/keys"), ("POST", "/v1/jobs")]
    assert [each["path"] for each in read(service, "audit", q=f"POST {job_id.upper()}")["data"]] == [
        f"/v1/jobs/{job_id}/cancel"
    ]
    assert [each["status"] for each in read(service, "audit", refused=True)["data"]] == [403]
    now = datetime.now(UTC)
    assert read(service, "audit", since=(now + timedelta(minutes=1)).isoformat())["data"] == []
    recent = (now - timedelta(minutes=1)).replace(tzinfo=None).isoformat()  # UTC without saying so
    assert len(read(service, "audit", since=recent)["data"]) == 3
    assert service.client.get("/v1/audit", params={"since": "yesterday"}).status_code == 422


def test_few_among_many_are_found_page_by_page(service: Service) -> None:
    log = AuditLog(service.redis)
    for number in range(BATCH + 50):
        path = "/v1/rare" if number % 500 == 0 else "/v1/jobs"
        entry: dict[str, str | int] = {"key_id": "k", "request_id": "r", "method": "POST", "path": path}
        log.append("default", entry | {"status": 200 + number % 2})
    first = read(service, "audit", q="rare", limit=2)
    rest = read(service, "audit", q="rare", limit=2, after=first["next"])
    assert ([len(page["data"]) for page in (first, rest)], rest["has_more"]) == ([2, 1], False)
    assert len({each["id"] for each in first["data"] + rest["data"]}) == 3
