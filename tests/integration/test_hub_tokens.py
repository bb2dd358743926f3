"""A job's hub token: it reads and pushes, and then is nowhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis

from app.core.access.hub_tokens import HubTokens
from app.core.errors import InvalidRequest
from app.core.records.job import JobState
from app.core.settings import Settings
from tests.integration.api_service import EXAMPLES, Service
from tests.integration.hub_server import HubServer, hub_server
from tests.integration.workshop import Workshop
from tests.waiting import wait_until

TOKEN = "hf_tokenthatnobodymaysee"
BUNDLED = EXAMPLES / "wikitext-llama-6m"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server() as server:
        server.token, server.writers = TOKEN, {TOKEN: "write"}
        server.push("org/gated", {path.name: path.read_bytes() for path in BUNDLED.iterdir()})
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def contents_of(redis: Redis) -> bytes:
    """All that is in Redis, as one text."""
    names = list(redis.scan_iter())
    texts = list(names)
    for key in names:
        kind = redis.type(key)
        if kind == b"string":
            texts.append(redis.get(key) or b"")
        elif kind == b"hash":
            texts += [b"%s %s" % item for item in redis.hgetall(key).items()]
        elif kind == b"stream":
            texts.append(repr(redis.xrange(key)).encode())
        elif kind == b"zset":
            texts += redis.zrange(key, 0, -1)
        elif kind == b"set":
            texts += redis.smembers(key)
        else:
            texts += redis.lrange(key, 0, -1)
    return b"\n".join(texts)


def require_absent(service: Service, caplog: pytest.LogCaptureFixture, said: str) -> None:
    secret = TOKEN.encode()
    assert secret not in contents_of(service.redis)
    for path in service.settings.state_dir.rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes(), path
    assert TOKEN not in said
    assert TOKEN not in caplog.text


def test_a_token_reads_and_pushes_and_is_nowhere(
    service: Service, hub: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    said: list[str] = []

    def ask(method: str, path: str, **request: Any) -> dict[str, Any]:
        answer = service.client.request(method, path, **request)
        said.append(answer.text + str(answer.headers))
        assert answer.is_success, answer.text
        document: dict[str, Any] = answer.json()
        return document

    body = {"model": "hf:org/gated", "push": {"repo_id": "org/out"}, "webhook": {"url": "https://1.1.1.1/"}}
    refused = service.client.post("/v1/jobs", json={**body, "push": None})
    assert refused.json()["code"] == "model_not_found"
    assert "hub_token" in refused.json()["remedy"]
    ask("POST", "/v1/estimates", json={**body, "hub_token": TOKEN})
    job = ask("POST", "/v1/jobs", json={**body, "hub_token": TOKEN}, headers={"Idempotency-Key": "k"})
    assert ask("POST", "/v1/jobs", json={**body, "hub_token": TOKEN}, headers={"Idempotency-Key": "k"})
    assert service.redis.keys("nibble:hub-token:*") == [f"nibble:hub-token:{job['id']}".encode()]
    assert 0 < service.redis.ttl(f"nibble:hub-token:{job['id']}") <= 31 * 24 * 3600
    require_absent(service, caplog, "".join(said))
    manifest = service.publish(job["id"], {"model.safetensors": b"weights"})
    service.end(job["id"], artifacts=(manifest.id,))
    where = f"/v1/artifacts/{manifest.id}"
    wait_until(lambda: ask("GET", where)["pushes"][0]["state"] == "pushed")
    assert service.redis.keys("nibble:hub-token:*") == []
    for path in (f"/v1/jobs/{job['id']}", f"/v1/jobs/{job['id']}/events", "/v1/audit", where, "/v1/registry",
                 f"/v1/jobs/{job['id']}/export", f"/v1/jobs/{job['id']}/webhook-deliveries"):  # fmt: skip
        ask("GET", path)
    require_absent(service, caplog, "".join(said))


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED])
def test_a_token_goes_with_its_job(service: Service, hub: HubServer, state: JobState) -> None:
    job = service.submit(hub_token=TOKEN)
    if state is JobState.CANCELLED:
        assert service.client.post(f"/v1/jobs/{job['id']}/cancel").is_success
    else:
        service.end(job["id"], state)
    assert service.redis.keys("nibble:hub-token:*") == []
    assert job["has_hub_token"]


def test_a_retry_without_the_token_says_so(service: Service, hub: HubServer) -> None:
    job = service.submit(model="hf:org/gated", hub_token=TOKEN)
    service.end(job["id"], JobState.FAILED)
    path = f"/v1/jobs/{job['id']}/retry"
    refused = service.client.post(path)
    assert (refused.status_code, refused.json()["code"]) == (422, "hub_token_missing")
    assert "--hub-token" in refused.json()["remedy"]
    again = service.client.post(path, json={"hub_token": TOKEN})
    assert again.status_code == 202, again.text
    assert again.json()["retry_of"] == job["id"]
    assert HubTokens(service.redis, service.settings).of(again.json()["id"]).get_secret_value() == TOKEN
    plain = service.submit()
    service.end(plain["id"], JobState.FAILED)
    assert service.client.post(f"/v1/jobs/{plain['id']}/retry").status_code == 202


def test_a_worker_reads_with_the_jobs_token(
    redis: Redis, redis_url: str, tmp_path: Path, hub: HubServer
) -> None:
    workshop = Workshop(redis, redis_url, tmp_path / "state")
    for has_token, end in ((True, JobState.SUCCEEDED), (False, JobState.FAILED)):
        job = workshop.submit(model="hf:org/gated")
        if has_token:
            workshop.store.update(job.id, lambda job: job.model_copy(update={"has_hub_token": True}))
            HubTokens(redis, workshop.settings).keep(job.id, SecretStr(TOKEN))
        done = workshop.run(job)
        assert done.state is end, done.error
    assert redis.keys("nibble:hub-token:*") == []
    lost = workshop.submit(model="hf:org/gated")
    workshop.store.update(lost.id, lambda job: job.model_copy(update={"has_hub_token": True}))
    error = workshop.run(lost).error
    assert error is not None
    assert error.code == "hub_token_missing"


def test_what_redis_holds_is_encrypted(redis: Redis, tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "state")
    tokens = HubTokens(redis, settings)
    tokens.keep("job_1", SecretStr(TOKEN))
    assert TOKEN.encode() not in contents_of(redis)
    assert (settings.state_dir / "secret-key").stat().st_mode & 0o777 == 0o600
    assert HubTokens(redis, settings).of("job_1") == SecretStr(TOKEN)
    tokens.hand_over("job_1", "push_1")
    tokens.forget("job_1")
    assert tokens.of("push_1") == SecretStr(TOKEN)
    with pytest.raises(InvalidRequest, match="is gone"):
        tokens.of("job_1")
