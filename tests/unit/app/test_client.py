from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from app.client import (
    DownloadCorrupt,
    NibbleClient,
    ServiceRefused,
    ServiceUnreachable,
    is_loopback,
)

JOB = {"id": "job_1", "state": "queued", "created_at": "2026-01-01T00:00:00Z", "spec": {"model": "m"}}
CONTENT = b"some weights"


def client_of(answer: Callable[[httpx.Request], httpx.Response], api_key: str | None = None) -> NibbleClient:
    return NibbleClient("http://nibble.test/", api_key=api_key, transport=httpx.MockTransport(answer))


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
    with pytest.raises(ServiceRefused, match="does not send"):
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


def test_follow_waits_out_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.client.RETRY_S", 0.0)
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
