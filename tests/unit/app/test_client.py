from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import httpx
import pytest

from app.client import (
    AsyncNibbleClient,
    DownloadCorrupt,
    Invalid,
    JobAnswer,
    JobEnded,
    NibbleClient,
    NotFound,
    Retries,
    ServiceRefused,
    ServiceUnreachable,
    TooMany,
    Unavailable,
)
from app.client.errors import split_remedy
from app.client.paths import is_loopback
from app.client.server_sent import Message, Messages
from app.client.views import Page
from app.core import errors

JOB = {"id": "job_1", "state": "queued", "created_at": "2026-01-01T00:00:00Z", "spec": {"model": "m"}}
CONTENT = b"some weights"


# Three tries without a pause between them.
QUICK = Retries(attempts=3, first_s=0.0)


def client_of(answer: Callable[[httpx.Request], httpx.Response], api_key: str | None = None) -> NibbleClient:
    transport = httpx.MockTransport(answer)
    return NibbleClient("http://nibble.test/", api_key=api_key, transport=transport, retries=QUICK)


def manifest(path: str, sha256: str) -> dict[str, object]:
    files = [{"path": path, "size": len(CONTENT), "sha256": sha256}]
    return {
        "id": "art_1", "job": "job_1", "created_at": "2026-01-01T00:00:00Z", "model": "m", "format": "awq",
        "files": files,
    }  # fmt: skip


def artifact_service(path: str, sha256: str) -> NibbleClient:
    def answer(request: httpx.Request) -> httpx.Response:
        if "/files/" in request.url.path:
            return httpx.Response(200, content=CONTENT)
        return httpx.Response(200, json=manifest(path, sha256))

    return client_of(answer)


def test_submit_sends_body_key_and_idempotency_key() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(202, json=JOB)

    job = client_of(answer, api_key="secret").submit({"model": "m"}, idempotency_key="once")
    assert job.id == "job_1"
    assert json.loads(seen[0].content) == {"model": "m"}
    assert seen[0].headers["Authorization"] == "Bearer secret"
    assert seen[0].headers["Idempotency-Key"] == "once"


def test_fields_of_a_newer_service_are_ignored() -> None:
    client = client_of(lambda _: httpx.Response(200, json={**JOB, "state": "paused", "colour": "blue"}))
    assert client.job("job_1").state == "paused"


def test_an_id_stays_one_path_part() -> None:
    paths: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.raw_path)
        return httpx.Response(200, json=JOB)

    client_of(answer).job("../artifacts?x")
    assert paths == [b"/v1/jobs/..%2Fartifacts%3Fx"]


def test_a_problem_becomes_an_error_with_code_and_remedy() -> None:
    problem = {"detail": "no such job", "code": "job_not_found", "remedy": "list the jobs", "param": "id"}
    client = client_of(lambda _: httpx.Response(404, json=problem))
    with pytest.raises(ServiceRefused, match="no such job") as caught:
        client.job("job_1")
    assert (caught.value.code, caught.value.remedy, caught.value.param) == (
        "job_not_found",
        "list the jobs",
        "id",
    )
    assert caught.value.status == 404


def test_an_error_page_of_something_else_is_named_by_its_status() -> None:
    client = client_of(lambda _: httpx.Response(502, text="<html>bad gateway</html>"))
    with pytest.raises(ServiceRefused, match="HTTP status 502") as caught:
        client.job("job_1")
    assert caught.value.code == "http_502"


def test_a_page_that_is_no_job_is_refused() -> None:
    client = client_of(lambda _: httpx.Response(200, text="<html>welcome</html>"))
    with pytest.raises(ServiceRefused, match="not Nibble's"):
        client.job("job_1")


def test_no_answer_says_how_to_start_the_service() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    client = client_of(answer)
    with pytest.raises(ServiceUnreachable, match="refused") as caught:
        client.jobs()
    assert "nibble up" in caught.value.remedy
    assert client.ready() is False


def test_follow_yields_each_change_until_the_end() -> None:
    answers = iter([
        httpx.Response(200, json=JOB, headers={"ETag": '"1"'}),
        httpx.Response(304),
        httpx.Response(200, json={**JOB, "state": "running"}, headers={"ETag": '"2"'}),
        httpx.Response(200, json={**JOB, "state": "succeeded"}, headers={"ETag": '"3"'}),
    ])  # fmt: skip
    asked: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("If-None-Match"))
        return next(answers)

    states = [job.state for job in client_of(answer).follow("job_1")]
    assert states == ["queued", "running", "succeeded"]
    assert asked == [None, '"1"', '"1"', '"2"']


def test_follow_waits_out_a_restart() -> None:
    calls = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise httpx.ConnectError("restarting", request=request)
        state = "queued" if calls == 1 else "succeeded"
        return httpx.Response(200, json={**JOB, "state": state}, headers={"ETag": f'"{calls}"'})

    assert [job.state for job in client_of(answer).follow("job_1")] == ["queued", "succeeded"]


def test_download_writes_checked_files(tmp_path: Path) -> None:
    client = artifact_service("sub/model.safetensors", hashlib.sha256(CONTENT).hexdigest())
    received: list[int] = []
    client.download("art_1", tmp_path, on_bytes=received.append)
    assert (tmp_path / "sub" / "model.safetensors").read_bytes() == CONTENT
    assert sum(received) == len(CONTENT)


def test_a_download_with_other_bytes_leaves_nothing(tmp_path: Path) -> None:
    client = artifact_service("model.safetensors", "0" * 64)
    with pytest.raises(DownloadCorrupt, match="expected 0000"):
        client.download("art_1", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["../escape", "/etc/passwd", "a/../../b", "."])
def test_a_file_outside_the_folder_is_refused(path: str, tmp_path: Path) -> None:
    client = artifact_service(path, hashlib.sha256(CONTENT).hexdigest())
    with pytest.raises(DownloadCorrupt, match="outside"):
        client.download("art_1", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_download_says_why(tmp_path: Path) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if "/files/" in request.url.path:
            return httpx.Response(404, json={"detail": "gone", "code": "file_not_found"})
        return httpx.Response(200, json=manifest("a", "0" * 64))

    with pytest.raises(ServiceRefused, match="gone"):
        client_of(answer).download("art_1", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8420", True),
        ("http://localhost", True),
        ("http://[::1]:1", True),
        ("http://a.test", False),
    ],
)
def test_loopback(url: str, expected: bool) -> None:
    assert is_loopback(url) is expected


def problem(status: int, code: str, **headers: str) -> httpx.Response:
    fields = [{"path": "a", "message": "b", "code": "c"}]
    document = {"detail": "no", "code": code, "remedy": "other", "errors": fields}
    return httpx.Response(status, json=document, headers={"X-Request-ID": "req-1", **headers})


@pytest.mark.parametrize(
    ("status", "expected"),
    [(404, errors.NotFound), (409, errors.Conflict), (422, Invalid), (401, errors.Unauthenticated),
     (403, errors.Forbidden), (400, errors.MalformedRequest), (429, TooMany), (503, errors.Unavailable),
     (418, ServiceRefused)],
)  # fmt: skip
def test_each_status_has_its_class(status: int, expected: type[Exception]) -> None:
    with pytest.raises(expected) as caught:
        client_of(lambda _: problem(status, "why")).job("job_1")
    assert isinstance(caught.value, ServiceRefused)
    assert (caught.value.code, caught.value.status, caught.value.request_id) == ("why", status, "req-1")
    assert caught.value.fields == (("a", "b"),)


class Script:
    """Answers in a row; what is an exception is raised."""

    def __init__(self, *steps: httpx.Response | type[httpx.TransportError]) -> None:
        self.steps = list(steps)
        self.seen: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        step = self.steps.pop(0)
        if isinstance(step, type):
            raise step("broken", request=request)
        return step


def test_a_post_is_repeated_under_one_key() -> None:
    script = Script(httpx.ReadError, problem(503, "redis_unavailable"), httpx.Response(202, json=JOB))
    assert client_of(script).submit({"model": "m"}).id == "job_1"
    assert len({request.headers["Idempotency-Key"] for request in script.seen}) == 1
    assert len(script.seen) == 3


def test_the_key_differs_between_requests() -> None:
    script = Script(httpx.Response(202, json=JOB), httpx.Response(202, json=JOB))
    client = client_of(script)
    client.submit({"model": "m"})
    client.submit({"model": "m"})
    assert len({request.headers["Idempotency-Key"] for request in script.seen}) == 2


def test_what_may_not_happen_twice_is_sent_once() -> None:
    script = Script(httpx.ReadError)
    with pytest.raises(ServiceUnreachable):
        client_of(script).rotate_webhook_secret()
    assert len(script.seen) == 1


def test_what_was_never_sent_is_sent_again() -> None:
    script = Script(httpx.ConnectError, httpx.Response(200, json={"secret": "whsec_x"}))
    assert client_of(script).rotate_webhook_secret().secret == "whsec_x"


def test_a_delete_whose_answer_was_lost_has_deleted() -> None:
    script = Script(httpx.ReadError, problem(404, "job_not_found"))
    client_of(script).delete_job("job_1")
    with pytest.raises(NotFound):
        client_of(Script(problem(404, "job_not_found"))).delete_job("job_1")


@pytest.mark.parametrize("answer", [problem(429, "queue_full"), problem(422, "x"), problem(500, "internal")])
def test_what_lasts_is_not_asked_again(answer: httpx.Response) -> None:
    script = Script(answer)
    with pytest.raises(ServiceRefused):
        client_of(script).submit({"model": "m"})
    assert len(script.seen) == 1


def test_tries_end() -> None:
    script = Script(*[problem(503, "unavailable")] * 3)
    with pytest.raises(Unavailable):
        client_of(script).jobs()
    assert script.steps == []


def test_a_long_retry_after_is_told_at_once() -> None:
    script = Script(problem(429, "rate_limited", **{"Retry-After": "60"}))
    with pytest.raises(TooMany) as caught:
        client_of(script).jobs()
    assert caught.value.retry_after_s == 60


def test_pauses_grow_and_follow_the_service() -> None:
    retries = Retries(first_s=1.0, longest_s=5.0, draw=lambda: 1.0)
    assert [retries.pause_s(tries, None) for tries in (1, 2, 3, 4)] == [1.0, 2.0, 4.0, 5.0]
    assert retries.pause_s(1, 3) == 3.0
    assert Retries(first_s=1.0, draw=lambda: 0.0).pause_s(1, None) == 0.5


def test_whoever_waits_is_told() -> None:
    told: list[str] = []
    retries = Retries(first_s=0.0, on_pause=lambda fault, seconds: told.append(fault.code))
    script = Script(problem(503, "redis_unavailable"), httpx.Response(200, json=JOB))
    with NibbleClient("http://a.test", transport=httpx.MockTransport(script), retries=retries) as client:
        client.job("job_1")
    assert told == ["redis_unavailable"]


def test_a_list_is_read_to_its_end() -> None:
    pages = Script(
        httpx.Response(200, json={"data": [JOB], "has_more": True, "next": "c"}),
        httpx.Response(200, json={"data": [{**JOB, "id": "job_2"}], "has_more": False}),
    )
    assert [job.id for job in client_of(pages).each_job(state="queued")] == ["job_1", "job_2"]
    assert pages.seen[1].url.params["after"] == "c"


def test_a_job_without_success_is_an_error_on_request() -> None:
    failed = {
        **JOB,
        "state": "failed",
        "error": {"code": "out_of_memory", "message": "no room", "remedy": "r"},
    }
    with pytest.raises(JobEnded, match="no room") as caught:
        JobAnswer.model_validate(failed).require_success()
    assert (caught.value.code, caught.value.remedy) == ("out_of_memory", "r")
    succeeded = JobAnswer.model_validate({**JOB, "state": "succeeded"})
    assert succeeded.require_success() is succeeded


def test_messages_come_whole_however_they_are_cut() -> None:
    stream = b"retry: 2000\n\n: still here\n\nid: 1-1\nevent: stage\ndata: a\ndata: \xc3\xa4\r\n\r\n"
    stream += b"id: 2\ndata:b\n\n"
    for size in (1, 2, 7, len(stream)):
        messages = Messages()
        pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
        found = [message for piece in pieces for message in messages.feed(piece)]
        assert found == [Message("1-1", "stage", "a\nä"), Message("2", "message", "b")]


def test_what_a_method_gives_follows_its_client() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"data": [], "has_more": False})

    async def ask() -> tuple[Page[JobAnswer], list[JobAnswer]]:
        async with AsyncNibbleClient("http://a.test", transport=httpx.MockTransport(answer)) as client:
            return await client.jobs(), [job async for job in client.each_job()]

    with NibbleClient("http://a.test", transport=httpx.MockTransport(answer)) as client:
        blocking = client.jobs(), list(client.each_job())
    assert asyncio.run(ask()) == blocking == (Page[JobAnswer](data=()), [])


def test_a_method_says_what_it_takes() -> None:
    assert list(signature(NibbleClient.jobs).parameters) == ["self", "state", "label", "limit", "after"]
    assert signature(NibbleClient.jobs) == signature(AsyncNibbleClient.jobs)
    assert (NibbleClient.jobs.__doc__ or "").startswith("A page of jobs")


@pytest.mark.parametrize(
    ("message", "parts"),
    [
        ("no such model (use a name)", ("no such model", "use a name")),
        (
            "9 (of 8) tokens (send fewer (or none))",
            ("9 (of 8) tokens", "send fewer (or none)"),
        ),
        ("no remedy", ("no remedy", "")),
        ("a call f(x)", ("a call f(x)", "")),
        ("an odd )", ("an odd )", "")),
        ("", ("", "")),
    ],
)
def test_an_inference_routes_remedy_is_told_from_its_message(message: str, parts: tuple[str, str]) -> None:
    assert split_remedy(message) == parts
