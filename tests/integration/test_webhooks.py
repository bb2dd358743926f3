"""Webhooks, sent to a real receiver: signed, repeated, logged."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from app.core.changes.redis_keys import DUE, delivery_key
from app.core.jobs.job_store import JobStore
from app.core.outgoing.address_guard import OutgoingGuard
from app.core.outgoing.webhook_messages import DeliveryStore, WebhookSecrets
from app.core.outgoing.webhook_sender import WebhookSender
from app.core.records.ids import new_id
from app.core.records.job import Job, JobState, transition
from app.core.records.specs import JobSpec
from app.core.settings import Settings
from tests.integration.api_service import ADMIN_KEY, EXAMPLES, MODEL, Service, running_service
from tests.servers import running
from tests.waiting import wait_until

LOOPBACK = (ip_network("127.0.0.0/8"),)


class Receiver(ThreadingHTTPServer):
    """Keeps what it is sent; answers the statuses in turn, then 204."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Reception)
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"


class Reception(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 204)
        self.send_header("Location", self.server.url)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with running(Receiver()) as server:
        yield server


def verified(secret: str, headers: dict[str, str], body: bytes) -> bool:
    """As a receiver does it, by the text of the specification."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    expected = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return expected in headers["webhook-signature"].split()


class Post:
    """A sender with its stores, without a service around."""

    def __init__(self, redis: Redis, receiver: Receiver, delays_s: tuple[float, ...] = (0.0, 0.0)) -> None:
        self.jobs = JobStore(redis)
        self.store = DeliveryStore(redis)
        self.secrets = WebhookSecrets(redis)
        self.outcomes: list[str] = []
        self.receiver = receiver
        self.sender = WebhookSender(
            self.store,
            self.secrets,
            OutgoingGuard(LOOPBACK),
            on_outcome=self.outcomes.append,
            delays_s=delays_s,
        )

    def ended_job(self, url: str | None = None, **webhook: Any) -> Job:
        spec = JobSpec.model_validate(
            {"model": MODEL, "webhook": {"url": url or self.receiver.url, **webhook}}
        )
        job = Job(id=new_id("job"), tenant="t", spec=spec, created_at=datetime.now(UTC))
        self.jobs.create(job)
        self.jobs.claim(job.id, 1, worker="w", lease_s=30)
        return self.jobs.update(job.id, lambda job: transition(job, JobState.SUCCEEDED), attempt=1)

    def send_all(self) -> None:
        while self.sender.send_due():
            pass


@pytest.fixture
def post(redis: Redis, receiver: Receiver) -> Post:
    return Post(redis, receiver)


def test_the_end_of_a_job_is_told_once_and_signed(post: Post, receiver: Receiver) -> None:
    job = post.ended_job(events=["job.started", "job.succeeded"])
    post.send_all()
    assert [json.loads(body)["type"] for _, body in receiver.received] == ["job.started", "job.succeeded"]
    headers, body = receiver.received[1]
    message = json.loads(body)
    assert (message["data"]["id"], message["data"]["state"]) == (job.id, "succeeded")
    secret = post.secrets.of("t")[0]
    assert verified(secret, headers, body)
    assert not verified(secret, headers, body + b" ")
    assert not verified(post.secrets.of("other")[0], headers, body)
    assert not verified(secret, {**headers, "webhook-timestamp": "1"}, body)
    assert [delivery.state for delivery in post.store.list(job.id)] == ["delivered"] * 2


def test_only_events_that_were_asked_for_are_told(post: Post, receiver: Receiver) -> None:
    post.ended_job(events=["job.failed"])
    post.send_all()
    assert receiver.received == []


def test_a_failing_receiver_is_tried_again_under_the_same_id(post: Post, receiver: Receiver) -> None:
    receiver.statuses = [500, 302]
    job = post.ended_job()
    post.send_all()
    assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 1
    (delivery,) = post.store.list(job.id)
    assert [tried.status for tried in delivery.tries] == [500, 302, 204]
    assert (delivery.state, post.outcomes) == ("delivered", ["retried", "retried", "delivered"])


def test_a_receiver_that_keeps_failing_or_is_gone_is_given_up(post: Post, receiver: Receiver) -> None:
    receiver.statuses = [500, 500, 500]
    job = post.ended_job()
    post.send_all()
    assert [delivery.state for delivery in post.store.list(job.id)] == ["failed"]
    assert len(receiver.received) == 3
    receiver.statuses = [410]
    post.ended_job()
    post.send_all()
    assert (len(receiver.received), post.outcomes[-1]) == (4, "failed")


def test_a_receiver_inside_the_network_hears_nothing(redis: Redis, receiver: Receiver) -> None:
    post = Post(redis, receiver, delays_s=())
    post.sender = WebhookSender(post.store, post.secrets, OutgoingGuard(), delays_s=())
    job = post.ended_job()
    post.send_all()
    (delivery,) = post.store.list(job.id)
    assert (delivery.state, delivery.tries[0].error) == ("failed", "destination_refused")
    assert receiver.received == []


def test_a_message_whose_sender_died_is_due_again(post: Post, receiver: Receiver) -> None:
    job = post.ended_job()
    assert post.store.take(hold_s=0.0) is not None
    post.send_all()
    assert len(receiver.received) == 1
    assert post.store.take(hold_s=0.0) is None
    assert [delivery.state for delivery in post.store.list(job.id)] == ["delivered"]


def test_a_message_of_a_newer_version_holds_up_no_other(post: Post, receiver: Receiver, redis: Redis) -> None:
    newer, job = post.ended_job(), post.ended_job()
    (message,) = post.store.list(newer.id)
    redis.set(
        delivery_key(message.id), message.model_dump_json().replace('"pending"', '"parked"'), keepttl=True
    )
    for _ in range(3):
        post.send_all()
    assert [json.loads(body)["data"]["id"] for _, body in receiver.received] == [job.id]
    assert post.store.list(newer.id) == []
    assert redis.zscore(DUE, message.id) is not None


def test_a_replaced_secret_signs_beside_its_successor(post: Post, receiver: Receiver) -> None:
    before = post.secrets.of("t")[0]
    after = post.secrets.rotate("t")
    post.ended_job()
    post.send_all()
    assert before != after
    assert all(verified(secret, *receiver.received[0]) for secret in (before, after))


@pytest.fixture
def service(redis_url: str, tmp_path: Path) -> Iterator[Service]:
    settings = Settings.model_validate(
        {
            "state_dir": tmp_path / "state",
            "redis_url": redis_url,
            "model_roots": (EXAMPLES,),
            "bootstrap_api_key": ADMIN_KEY,
            "outgoing_networks": "127.0.0.1/32",
        }
    )
    with running_service(settings) as service:
        yield service


def test_the_service_delivers_logs_and_delivers_again(service: Service, receiver: Receiver) -> None:
    job_id = service.submit(webhook={"url": receiver.url})["id"]
    route = f"/v1/jobs/{job_id}/webhook-deliveries"
    assert service.client.get(route).json()["data"] == []
    service.end(job_id)
    wait_until(lambda: receiver.received)
    secret = service.client.get("/v1/webhook-secret").json()["secret"]
    assert verified(secret, *receiver.received[0])
    wait_until(lambda: service.client.get(route).json()["data"][0]["state"] == "delivered")
    (delivery,) = service.client.get(route).json()["data"]
    assert service.client.post(f"{route}/{delivery['id']}/redeliver").status_code == 202
    wait_until(lambda: len(receiver.received) == 2)
    assert receiver.received[1][0]["webhook-id"] == delivery["id"]
    assert service.client.post(f"{route}/msg_none/redeliver").json()["code"] == "delivery_not_found"
    assert service.client.post("/v1/webhook-secret/rotate").json()["secret"] != secret


@pytest.mark.parametrize(
    "url", ["https://169.254.169.254/latest", "http://8.8.8.8/", "https://name.invalid/", "ftp://8.8.8.8/"]
)
def test_a_url_that_could_not_be_called_is_refused_at_once(service: Service, url: str) -> None:
    answer = service.client.post("/v1/jobs", json={"model": MODEL, "webhook": {"url": url}})
    assert (answer.status_code, answer.json()["param"]) == (422, "webhook.url")
