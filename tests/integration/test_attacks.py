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
import hashlib
import hmac
import ipaddress
import json
import os
import pickle
import socket
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis import Redis
from rq import Queue
from rq.exceptions import DeserializationError

import app.server
from app.api import middleware
from app.core.access.api_keys import KeyStore, new_key
from app.core.access.authentication import Authenticator, Credential
from app.core.access.limits import TenantLimits
from app.core.access.links import LinkSigner
from app.core.jobs.job_queue import RUN_JOB_TASK, SERIALIZER
from app.core.jobs.job_store import JobStore
from app.core.outgoing.address_guard import OutgoingGuard
from app.core.outgoing.webhook_messages import DeliveryStore, WebhookSecrets
from app.core.outgoing.webhook_sender import WebhookSender
from app.core.records.ids import new_id
from app.core.records.job import Job
from app.core.records.job_changes import cancel_requested
from app.core.records.specs import JobSpec, WebhookSpec
from app.core.redis.redis_server import connect
from app.core.settings import Settings
from tests.integration.api_service import ADMIN_KEY, MODEL, Service
from tests.integration.workshop import Workshop
from tests.waiting import wait_until
from workers.queue_worker import ListedEntry

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
        wait_until(lambda: "checkpoint" in workshop.kinds(job))
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    ours = [line for line in lines if b"app.core.child.start" in line or b"stand_in" in line]
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


def test_secrets_are_compared_in_constant_time(
    redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison that ends at the first difference tells how much of a guess was right."""
    compared: list[tuple[object, object]] = []
    real = hmac.compare_digest

    def noted(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr("hmac.compare_digest", noted)
    key = new_key()
    KeyStore(redis).register(key, tenant="t", scopes=frozenset())
    authenticator = Authenticator(redis, KeyStore(redis), TenantLimits(redis, Settings(state_dir=tmp_path)))
    authenticator.holder(Credential.of_key(key))
    digest = hashlib.sha256(key.encode()).hexdigest()
    assert compared == [(digest, digest)]
    signer = LinkSigner(redis)
    signature = signer.path("art_1", "f", lasts_s=60).rpartition("=")[2]
    expires = int(signer.path("art_1", "f", lasts_s=60).partition("expires=")[2].partition("&")[0])
    signer.check("art_1", "f", expires=expires, signature=signature)
    assert compared[1] == (signature.encode(), signature.encode())


class Touching:
    """What a pickle may do when it is read."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._mark),)


def test_a_pickle_in_the_queue_is_not_read(redis: Redis, tmp_path: Path) -> None:
    """Under the name of our own task, with arguments that run code where they are unpacked."""
    mark = tmp_path / "mark"
    entry = Queue("nibble-normal", connection=redis, serializer="json").enqueue_call(RUN_JOB_TASK)
    payload = pickle.dumps((RUN_JOB_TASK, None, (Touching(mark), 1), {}))
    redis.hset(entry.key, "data", zlib.compress(payload))
    read = ListedEntry.fetch(entry.id, connection=redis, serializer=SERIALIZER)
    with pytest.raises(DeserializationError):
        read.perform()
    assert not mark.exists()


def test_callbacks_of_an_entry_are_not_called(redis: Redis) -> None:
    """They are imported by name like the task itself."""
    queue = Queue("nibble-normal", connection=redis, serializer="json")
    for kind in ("success", "failure", "stopped"):
        entry = queue.enqueue_call(RUN_JOB_TASK, args=("job_x", 1))
        redis.hset(entry.key, f"{kind}_callback_name", "os.system")
        read = ListedEntry.fetch(entry.id, connection=redis, serializer=SERIALIZER)
        assert getattr(read, f"{kind}_callback") is None


@contextmanager
def endless_receiver() -> Iterator[tuple[str, list[int]]]:
    """Answers, and then never stops; how many bytes it could send."""
    sent = [0]
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
                try:
                    while sent[0] < 50_000_000:
                        sent[0] += connection.send(b"x" * 4096)
                except OSError:
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/", sent
        thread.join()


def test_a_receiver_that_never_stops_answering_is_left(redis: Redis) -> None:
    store = DeliveryStore(redis)
    guard = OutgoingGuard([ipaddress.ip_network("127.0.0.0/8")])
    with endless_receiver() as (url, sent):
        spec = JobSpec(model=MODEL, webhook=WebhookSpec(url=url, events=("job.cancelled",)))
        job = Job(id=new_id("job"), tenant="t", spec=spec, created_at=datetime.now(UTC))
        jobs = JobStore(redis)
        jobs.create(job)
        jobs.update(job.id, cancel_requested)
        assert WebhookSender(store, WebhookSecrets(redis), guard).send_due()
    (written,) = store.list(job.id)
    assert (written.state, written.tries[0].status) == ("delivered", 200)
    assert sent[0] < 30_000_000


def connected(service: Service) -> socket.socket:
    parts = urlsplit(service.url)
    connection = socket.create_connection((str(parts.hostname), int(parts.port or 80)))
    connection.settimeout(30)
    return connection


@pytest.mark.parametrize("first", [b"", b"GET /healthz HTTP/1.1\r\nHost: 127", b"POST /v1/jobs HTT"])
def test_a_request_whose_head_does_not_arrive_is_ended(
    service: Service, monkeypatch: pytest.MonkeyPatch, first: bytes
) -> None:
    """Slowloris: connections that are kept open with a byte now and then."""
    monkeypatch.setattr(app.server, "HEAD_LIMIT_S", 0.3)
    with connected(service) as slow:
        slow.sendall(first)
        assert service.client.get("/healthz").status_code == 200
        assert slow.recv(100).startswith(b"HTTP/1.1 408 ")
        assert slow.recv(100) == b""


def test_a_second_request_on_a_connection_must_arrive_too(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.server, "HEAD_LIMIT_S", 0.3)
    host = urlsplit(service.url).netloc.encode()
    with connected(service) as slow, slow.makefile("rb") as answers:
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
        assert answers.readline().startswith(b"HTTP/1.1 200 ")
        slow.sendall(b"G")
        assert b"HTTP/1.1 408 Request Timeout" in answers.read()


def test_a_body_that_does_not_arrive_is_refused(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_LIMIT_S", 0.3)
    host = urlsplit(service.url).netloc.encode()
    with connected(service) as slow, slow.makefile("rb") as answers:
        slow.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: " + host + b"\r\nContent-Length: 9\r\n\r\n{")
        answer = answers.read()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"body_too_slow" in answer
