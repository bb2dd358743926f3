"""Both clients against a running API, directly and through proxies that break connections."""

from __future__ import annotations

import asyncio
import random
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from inspect import Parameter, isawaitable, signature
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from app.client import (
    AsyncNibbleClient,
    Conflict,
    DownloadCorrupt,
    InferenceRefused,
    JobAnswer,
    NibbleClient,
    NotFound,
    PreconditionFailed,
    Retries,
    ServiceRefused,
    ServiceUnreachable,
    WaitTimedOut,
)
from app.client.connection import returns, yields
from app.client.service_calls import Operations
from app.core.records.job import JobState
from app.core.records.specs import JobSpec
from app.core.settings import Settings
from app.core.storage.artifact_store import file_key
from tests.faults.proxy import FaultProxy
from tests.integration.api_service import ADMIN_KEY, EXAMPLES, MODEL, Service, running_service
from tests.integration.cutting_proxy import CuttingProxy
from tests.servers import running

QUICK = Retries(attempts=5, first_s=0.01)
Ask = Callable[..., Any]


def ask_blocking(url: str, name: str, *arguments: Any, **options: Any) -> Any:
    """What a method gives; of an iterator all items."""
    retries = options.pop("retries", QUICK)
    with NibbleClient(url, api_key=ADMIN_KEY, retries=retries) as client:
        given = getattr(client, name)(*arguments, **options)
        return list(given) if isinstance(given, Iterator) else given


def ask_awaiting(url: str, name: str, *arguments: Any, **options: Any) -> Any:
    retries = options.pop("retries", QUICK)

    async def ask() -> Any:
        async with AsyncNibbleClient(url, api_key=ADMIN_KEY, retries=retries) as client:
            given = getattr(client, name)(*arguments, **options)
            if isawaitable(given):
                return await given
            assert isinstance(given, AsyncIterator)
            async with aclosing(given) as items:  # type: ignore[type-var]  # an asynchronous generator
                return [item async for item in items]

    return asyncio.run(ask())


@pytest.fixture(params=[ask_blocking, ask_awaiting], ids=["blocking", "awaiting"])
def ask(request: pytest.FixtureRequest) -> Ask:
    chosen: Ask = request.param
    return chosen


@pytest.fixture
def flaky(service: Service) -> Iterator[FaultProxy]:
    with running(FaultProxy(service.url)) as proxy:
        yield proxy


@pytest.fixture
def cutting(service: Service) -> Iterator[CuttingProxy]:
    with running(CuttingProxy(service.url)) as proxy:
        yield proxy


def test_a_job_from_submission_to_its_end(service: Service, ask: Ask) -> None:
    job = ask(service.url, "submit", JobSpec(model=MODEL, labels={"team": "a"}))
    assert (job.state, job.labels) == ("queued", {"team": "a"})
    assert ask(service.url, "jobs", label="team=a").items == (job,)
    with pytest.raises(WaitTimedOut, match="queued"):
        ask(service.url, "wait_for", job, timeout=0.2)
    service.claim(job.id)
    ender = threading.Timer(0.3, service.store.update, (job.id, ended), {"attempt": 1})
    ender.start()
    assert ask(service.url, "wait_for", job, timeout=60).require_success().state == "succeeded"
    ender.join()
    assert [seen.state for seen in ask(service.url, "follow", job)] == ["succeeded"]
    assert [event.kind for event in ask(service.url, "events", job)][:1] == ["state"]
    ask(service.url, "delete_job", job)
    with pytest.raises(NotFound) as caught:
        ask(service.url, "job", job)
    assert caught.value.request_id


def ended(job: Any) -> Any:
    return job.model_copy(update={"state": JobState.SUCCEEDED})


def test_a_lost_answer_makes_no_second_job(service: Service, flaky: FaultProxy, ask: Ask) -> None:
    flaky.pending.extend(["lost", "503", "lost"])
    job = ask(flaky.url, "submit", {"model": MODEL})
    assert flaky.met == ["lost", "503", "lost"]
    assert [each.id for each in ask(service.url, "each_job")] == [job.id]
    service.end(job.id)
    flaky.pending.append("lost")
    again = ask(flaky.url, "retry", job)
    assert again.retry_of == job.id
    assert [each.id for each in ask(service.url, "each_job")] == [again.id, job.id]
    manifest = service.publish(job.id, {"config.json": b"{}"})
    flaky.pending.append("lost")
    made = ask(flaky.url, "deploy", {"artifact": manifest.id, "name": "tiny"})
    assert [each.id for each in ask(service.url, "each_deployment")] == [made.id]
    assert ask(service.url, "deployment_named", "tiny").id == made.id
    flaky.pending.append("lost")
    changed = ask(flaky.url, "change_deployment", made.id, {"replicas": 2, "aliases": ["small"]})
    assert (changed.replicas, changed.revision) == (2, 2)  # sent twice, changed once
    with pytest.raises(PreconditionFailed):
        ask(service.url, "change_deployment", made.id, {"replicas": 3}, revision=1)
    assert ask(service.url, "deployment_named", "small").replicas == 2
    flaky.pending.append("lost")
    ask(flaky.url, "delete_deployment", made.id, wait=True)
    assert not ask(service.url, "deployments").items


def test_a_lost_answer_makes_no_second_key(service: Service, flaky: FaultProxy, ask: Ask) -> None:
    flaky.pending.append("lost")
    with pytest.raises(Conflict) as caught:
        ask(flaky.url, "create_key", {"scopes": ["jobs:read"], "name": "ci"})
    (made,) = (key for key in ask(service.url, "keys").items if key.name == "ci")
    assert caught.value.code == "key_made_before"
    assert made.id in caught.value.remedy


def test_broken_answers_are_asked_for_again(service: Service, flaky: FaultProxy, ask: Ask) -> None:
    job = ask(service.url, "submit", {"model": MODEL})
    flaky.pending.extend(["reset", "truncated", "503", "lost"])
    assert ask(flaky.url, "job", job.id) == job
    assert not flaky.pending


def test_tries_end_and_say_where(flaky: FaultProxy, ask: Ask) -> None:
    flaky.pending.extend(["reset"] * 50)
    with pytest.raises(ServiceUnreachable, match=flaky.url):
        ask(flaky.url, "workers")
    assert len(flaky.met) == QUICK.attempts


def test_no_event_is_missed_or_repeated(service: Service, cutting: CuttingProxy, ask: Ask) -> None:
    job_id = service.submit()["id"]
    service.claim(job_id)
    for number in range(40):
        service.store.append_event(job_id, "note", {"number": number})
    cutting.cuts.extend([100, 700, 1500, 1501, 2500])

    def go_on() -> None:
        for number in range(40, 80):
            service.store.append_event(job_id, "note", {"number": number})
        service.store.update(job_id, ended, attempt=1)

    teller = threading.Timer(0.3, go_on)
    teller.start()
    events = ask(cutting.url, "events", job_id)
    teller.join()
    numbers = [event.payload["number"] for event in events if event.kind == "note"]
    assert numbers == list(range(80))
    assert [event.id for event in events] == [event.id for event in service.store.events(job_id)]
    resumed = [head for head in cutting.asked if "last-event-id" in head.lower()]
    assert len(resumed) >= 3


@pytest.fixture
def content() -> bytes:
    return random.Random(7).randbytes(1_500_000)


def test_a_download_goes_on_where_it_broke(
    service: Service, cutting: CuttingProxy, ask: Ask, content: bytes, tmp_path: Path
) -> None:
    job_id = service.submit()["id"]
    manifest = service.publish(job_id, {"model.safetensors": content, "config.json": b"{}", "empty": b""})
    cutting.cuts.extend([400_000, 300_000, 30, 600_000])
    received: list[int] = []
    ask(cutting.url, "download", manifest.id, tmp_path / "out", on_bytes=received.append)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors": content, "config.json": b"{}", "empty": b"",
    }  # fmt: skip
    assert sum(received) == manifest.size
    starts = [
        int(found[1]) for head in cutting.asked if (found := re.search(r"(?i)range: bytes=(\d+)-", head))
    ]
    assert starts == sorted(starts)
    assert starts[0] >= 250_000
    assert cutting.answered < 1.5 * len(content)
    before = cutting.answered
    ask(cutting.url, "download", manifest.id, tmp_path / "out")
    assert cutting.answered - before < 10_000, "what is there and whole was sent again"


def test_a_later_download_continues_an_earlier_one(
    service: Service, cutting: CuttingProxy, ask: Ask, content: bytes, tmp_path: Path
) -> None:
    manifest = service.publish(service.submit()["id"], {"model.safetensors": content})
    cutting.cuts.extend([900_000, *[0] * 20])
    with pytest.raises(ServiceUnreachable):
        ask(cutting.url, "download", manifest.id, tmp_path)
    part = tmp_path / "model.safetensors.partial"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [part.name]
    assert content.startswith(part.read_bytes())
    cutting.cuts.clear()
    cutting.asked.clear()
    kept = part.stat().st_size
    ask(cutting.url, "download", manifest.id, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == content
    assert not part.exists()
    assert any(f"bytes={kept}-" in head for head in cutting.asked)


def test_a_part_with_other_bytes_is_discarded(
    service: Service, ask: Ask, content: bytes, tmp_path: Path
) -> None:
    manifest = service.publish(service.submit()["id"], {"a": content})
    (tmp_path / "a.partial").write_bytes(b"x" * 1000)
    ask(service.url, "download", manifest.id, tmp_path)
    assert (tmp_path / "a").read_bytes() == content


def test_a_damaged_file_never_appears(service: Service, ask: Ask, content: bytes, tmp_path: Path) -> None:
    manifest = service.publish(service.submit()["id"], {"a": content})
    service.objects.put(file_key(manifest, "a"), content[:-1] + b"?")
    with pytest.raises((DownloadCorrupt, ServiceUnreachable)):
        ask(service.url, "download", manifest.id, tmp_path / "out")
    assert not (tmp_path / "out" / "a").exists()


def test_a_download_from_s3_goes_on_where_it_broke(
    s3_endpoint: str,
    redis_url: str,
    content: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The API redirects to storage; the cut connections are those to the storage."""
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="nibble")
    with running(CuttingProxy(s3_endpoint)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        settings = Settings(
            state_dir=tmp_path / "state", redis_url=redis_url, storage_url="s3://nibble/p",
            model_roots=(EXAMPLES,), bootstrap_api_key=ADMIN_KEY, janitor_interval_s=300,
        )  # fmt: skip
        with running_service(settings) as service:
            manifest = service.publish(service.submit()["id"], {"a": content})
            proxy.asked.clear()
            with NibbleClient(service.url, api_key=ADMIN_KEY, retries=QUICK) as client:
                assert client.artifact(manifest.id).size == len(content)
                proxy.only = "X-Amz-Signature"
                proxy.cuts.extend([500_000, 500_000])
                client.download(manifest.id, tmp_path / "out")
    assert (tmp_path / "out" / "a").read_bytes() == content
    downloads = [head for head in proxy.asked if "X-Amz-Signature" in head.partition("\r\n")[0]]
    assert len(downloads) == 3
    assert sum("range: bytes=" in head.lower() for head in downloads) == 2
    assert not any("authorization" in head.lower() for head in downloads), "the key went to the storage"


def test_many_wait_on_one_loop(service: Service) -> None:
    ids = [service.submit(labels={"n": str(number)})["id"] for number in range(12)]

    async def wait() -> list[JobAnswer]:
        async with AsyncNibbleClient(service.url, api_key=ADMIN_KEY, retries=QUICK) as client:
            waiting = [asyncio.create_task(client.wait_for(job_id, timeout=60)) for job_id in ids]
            assert (await client.workers()).items == ()
            for job_id in ids:
                await asyncio.to_thread(service.end, job_id)
            return await asyncio.gather(*waiting)

    assert [job.state for job in asyncio.run(wait())] == ["succeeded"] * len(ids)


def test_leaving_an_iterator_closes_its_connection(service: Service) -> None:
    job_id = service.submit()["id"]

    async def first_event() -> str:
        client = AsyncNibbleClient(service.url, api_key=ADMIN_KEY)
        async with client, aclosing(client.events(job_id)) as events:
            async for event in events:
                return event.kind
        return ""

    assert asyncio.run(first_event()) == "state"
    with NibbleClient(service.url, api_key=ADMIN_KEY) as client:
        events = client.events(job_id)
        assert next(events).kind == "state"
        events.close()
        assert client.job(job_id).state == "queued"


# Routes for browsers, for those who hold a link, and for OpenAI's own clients.
FOR_OTHERS = re.compile(
    r"^(GET /|GET /login|POST /v1/logout|GET /v1/whoami|GET /healthz|GET /metrics|GET /v1/downloads/.*"
    r"|POST /v1/(completions|responses|messages.*|embeddings)|POST /(de)?tokenize|GET /v1/models.*"
    r"|GET /v1/scrape-targets|GET /v1/deployments/.*/metrics|GET /v1/artifacts/.*/files/.*)$"
)


def test_every_route_has_a_method(service: Service) -> None:
    asked: list[str] = []

    def note(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.method} {request.url.path}")
        return httpx.Response(418)

    client = NibbleClient("http://a.test", transport=httpx.MockTransport(note))
    for name, method in vars(Operations).items():
        if isinstance(method, returns | yields) and not (name == "ready" and not client.ready()):
            call_somehow(getattr(client, name), getattr(NibbleClient, name))
    paths = service.client.get("/openapi.json").json()["paths"]
    for path, operations in paths.items():
        for verb in operations:
            route = f"{verb.upper()} {path}"
            pattern = re.compile(re.sub(r"\\\{.*?\\\}", "[^/]+", re.escape(route)))
            assert FOR_OTHERS.match(route) or any(pattern.fullmatch(each) for each in asked), route


def call_somehow(bound: Callable[..., Any], method: Callable[..., Any]) -> None:
    """Call with a word for every argument that must be given; the answer is a refusal."""
    needed = [
        each for each in list(signature(method).parameters.values())[1:] if each.default is Parameter.empty
    ]
    words: list[Any] = [
        {} if "Mapping" in each.annotation or "Body" in each.annotation else "x" for each in needed
    ]
    with pytest.raises((ServiceRefused, InferenceRefused), match="418"):
        exhaust(bound(*words))


def exhaust(given: object) -> None:
    if isinstance(given, Iterator):
        list(given)
