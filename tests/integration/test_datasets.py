"""Texts of one's own: uploaded, looked at, read by jobs, deleted."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis import Redis
from ulid import ULID

from app.client import AsyncNibbleClient, Conflict, NibbleClient
from app.core.access.api_keys import Scope
from app.core.errors import TextRefused
from app.core.records.dataset import DatasetManifest
from app.core.records.job import JobState
from app.core.records.specs import CalibrationSpec, JobSpec
from app.core.sources import text_preview
from app.core.sources.fetching import fetch_text
from app.core.sources.uploaded_text import open_job_text
from app.core.storage.dataset_store import DatasetStore
from app.core.storage.storage_keys import dataset_content_key
from tests.integration.api_service import MODEL, Service
from tests.integration.workshop import Workshop
from tests.waiting import wait_until

ROW = json.dumps({"text": "a text of some words, again and again " * 4}) + "\n"
CHAT = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]})
OCTETS = {"Content-Type": "application/octet-stream"}


def key_of(service: Service) -> str:
    key: str = service.client.headers["authorization"].split()[1]
    return key


def uploaded(service: Service, content: bytes, name: str = "train.jsonl", **params: object) -> dict[str, Any]:
    answer = service.client.post(
        "/v1/datasets", params={"name": name, **params}, content=content, headers=OCTETS
    )
    assert answer.status_code == 201, answer.text
    document: dict[str, Any] = answer.json()
    return document


def test_a_file_is_stored_as_it_came_and_shown(service: Service) -> None:
    content = (ROW * 50 + CHAT + "\n").encode()
    dataset = uploaded(service, content, sequence_length=64, sha256=sha256(content).hexdigest())
    assert (dataset["documents"], dataset["conversations"], dataset["is_estimate"]) == (51, 1, False)
    assert (dataset["size"], dataset["sha256"]) == (len(content), sha256(content).hexdigest())
    assert dataset["reference"] == f"upload:{dataset['id']}"
    assert dataset["first"][0].startswith("a text of some words")
    text = len(json.loads(ROW)["text"]) * 50 + len("user: Hi\nassistant: Ho")
    assert (dataset["tokens"], dataset["windows"]) == (text // 4, text // 4 // 64)
    assert service.objects.get(dataset_content_key(dataset["id"])) == content
    again = service.client.get(f"/v1/datasets/{dataset['id']}", params={"sequence_length": 128}).json()
    assert again == {**dataset, "sequence_length": 128, "windows": text // 4 // 128}
    entry = service.client.get("/v1/audit").json()["data"][0]
    assert entry["path"] == "/v1/datasets"
    assert dataset["id"] in entry["detail"]
    assert "train.jsonl" in entry["detail"]


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("chats.ndjson", CHAT.encode(), 1),
        ("sharegpt.json", json.dumps([{"conversations": [{"from": "human", "value": "x"}]}] * 3).encode(), 3),
        ("pairs.jsonl", b'{"prompt": "a", "completion": "b"}\n' * 4, 4),
        ("alpaca.jsonl", b'{"instruction": "a", "output": "b"}\n' * 5, 5),
        ("book.txt", b"one text", 1),
        ("table.csv", b"text,other\nabc,1\ndef,2\n", 2),
        ("train.jsonl.gz", gzip.compress(ROW.encode() * 7, mtime=0), 7),
    ],
)
def test_the_shapes_that_people_have(service: Service, name: str, content: bytes, documents: int) -> None:
    dataset = uploaded(service, content, name)
    assert (dataset["documents"], dataset["is_estimate"]) == (documents, False)
    assert dataset["first"]


@pytest.mark.parametrize(
    ("name", "content", "status", "code"),
    [
        ("train.jsonl", b"", 422, "text_empty"),
        ("train.jsonl", b'{"text": ""}\n', 422, "text_empty"),
        ("train.jsonl", ROW.encode() + b'{"other": 1}\n', 422, "text_malformed"),
        ("train.jsonl", b'{"text": "a"\n', 422, "text_malformed"),
        ("train.txt", b"\xff\xfe\x00", 422, "text_malformed"),
        ("train.jsonl.gz", b"\x1f\x8b\x08 is no gzip", 422, "text_malformed"),
        ("train.jsonl.gz", gzip.compress(ROW.encode() * 60, mtime=0)[:80], 422, "text_malformed"),
        ("train.txt.gz", gzip.compress(ROW.encode(), mtime=0)[:-4], 422, "text_malformed"),
        ("train.jsonl", ROW.encode() * 20_000 + b"no row\n", 422, "text_malformed"),
        ("train.parquet", b"PAR1", 422, "dataset_name_invalid"),
        ("../../etc/x.jsonl", ROW.encode(), 422, "dataset_name_invalid"),
    ],
)
def test_what_no_job_could_read_is_refused_and_not_kept(
    service: Service, name: str, content: bytes, status: int, code: str
) -> None:
    answer = service.client.post("/v1/datasets", params={"name": name}, content=content, headers=OCTETS)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json()["remedy"]
    assert ("to_json" in answer.json()["remedy"]) == (name == "train.parquet")
    assert service.client.get("/v1/datasets").json()["data"] == []
    assert service.objects.list("datasets") == []


def test_a_line_is_named(service: Service) -> None:
    content = ROW.encode() * 41 + b'{"other": 1}\n'
    answer = service.client.post("/v1/datasets", params={"name": "a.jsonl"}, content=content, headers=OCTETS)
    assert "a.jsonl, line 42" in answer.json()["detail"]


def test_a_form_is_not_taken_for_a_text(service: Service) -> None:
    files = {"file": ("train.txt", b"a text", "text/plain")}
    answer = service.client.post("/v1/datasets", params={"name": "train.txt"}, files=files)
    assert (answer.status_code, answer.json()["code"]) == (422, "dataset_is_form"), answer.text
    assert service.objects.list("datasets") == []


@pytest.mark.parametrize("name", ["one.jsonl", "one.txt", "one.jsonl.gz"])
def test_one_line_beyond_the_preview_has_no_counts(name: str) -> None:
    line = json.dumps({"text": "word " * (text_preview.PREVIEW_BYTES // 4)}).encode()
    content = gzip.compress(line, 1) if name.endswith(".gz") else line
    seen = text_preview.preview_of(name, content[: text_preview.PREVIEW_BYTES], len(content))
    assert (seen.documents, seen.text_bytes, seen.is_estimate) == (None, None, True)


def test_a_damaged_upload_is_refused(service: Service) -> None:
    answer = service.client.post(
        "/v1/datasets", params={"name": "a.txt", "sha256": "0" * 64}, content=b"text", headers=OCTETS
    )
    assert (answer.status_code, answer.json()["code"]) == (422, "dataset_damaged")
    assert service.objects.list("datasets") == []


def test_a_file_larger_than_a_body_streams(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the limit of other bodies; its counts are estimated from its beginning."""
    monkeypatch.setattr("app.api.datasets.PREVIEW_BYTES", 1 << 20)
    file = tmp_path / "large.jsonl"
    rows = max(service.settings.max_body_bytes, 2 << 20) // len(ROW) + 5000
    file.write_text(ROW * rows)
    with NibbleClient(service.url, api_key=key_of(service)) as client:
        dataset = client.upload_dataset(file.name, file)
    assert dataset.size == file.stat().st_size > service.settings.max_body_bytes
    assert dataset.is_estimate
    assert dataset.documents == pytest.approx(rows, rel=0.01)
    assert dataset.sha256 == sha256(file.read_bytes()).hexdigest()


def test_the_client_of_event_loops_sends_files_too(service: Service, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(ROW * 9)

    async def visit() -> None:
        async with AsyncNibbleClient(service.url, api_key=key_of(service)) as client:
            dataset = await client.upload_dataset(file.name, file)
            assert [each.id async for each in client.each_dataset()] == [dataset.id]
            assert (await client.dataset(dataset.id)).documents == 9

    asyncio.run(visit())


def test_an_upload_that_breaks_off_leaves_nothing(service: Service) -> None:
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        key = service.client.headers["authorization"]
        head = (
            f"POST /v1/datasets?name=a.jsonl HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: {key}\r\n"
            f"Content-Length: 1000000\r\n\r\n"
        )
        connection.sendall(head.encode() + ROW.encode() * 10)
    wait_until(lambda: service.objects.list("datasets") == [])
    assert service.client.get("/v1/datasets").json()["data"] == []


def test_datasets_are_their_tenants(service: Service) -> None:
    """Listed in pages, newest first; nobody else sees, reads or deletes one."""
    ids = [uploaded(service, ROW.encode())["id"] for _ in range(3)]
    first = service.client.get("/v1/datasets", params={"limit": 2}).json()
    second = service.client.get("/v1/datasets", params={"after": first["next"]}).json()
    assert [each["id"] for each in first["data"] + second["data"]] == sorted(ids, reverse=True)
    assert not second["has_more"]
    with service.client_with(service.key(Scope.JOBS_READ, Scope.JOBS_WRITE, tenant="other")) as other:
        assert other.get("/v1/datasets").json()["data"] == []
        assert other.get(f"/v1/datasets/{ids[0]}").status_code == 404
        assert other.delete(f"/v1/datasets/{ids[0]}").status_code == 404
        body = {"model": MODEL, "calibration": {"dataset": f"upload:{ids[0]}"}}
        for route in ("/v1/jobs", "/v1/estimates"):
            refused = other.post(route, json=body)
            assert (refused.status_code, refused.json()["code"]) == (422, "dataset_not_found")
            assert refused.json()["param"] == "calibration.dataset"


def test_storage_of_the_tenant_is_the_limit(service: Service) -> None:
    content = ROW.encode() * 100
    limits = service.client.get("/v1/tenants/default/limits").json()["limits"]
    service.client.put(
        "/v1/tenants/default/limits", json={**limits, "storage_bytes": len(content) + 10}
    ).raise_for_status()
    dataset = uploaded(service, content)

    def chunks() -> Iterator[bytes]:  # without a length in the head
        yield b"much more text"

    for body in (b"much more text", chunks()):
        answer = service.client.post("/v1/datasets", params={"name": "b.txt"}, content=body, headers=OCTETS)
        assert (answer.status_code, answer.json()["code"]) == (429, "storage_quota_exceeded")
    service.client.delete(f"/v1/datasets/{dataset['id']}").raise_for_status()
    uploaded(service, b"much more text", "b.txt")


def test_a_dataset_is_not_deleted_under_a_job(service: Service) -> None:
    used = {section: uploaded(service, ROW.encode() * 200) for section in ("calibration", "evaluation")}
    job = service.submit(**{section: {"dataset": each["reference"]} for section, each in used.items()})["id"]
    for dataset in used.values():
        answer = service.client.delete(f"/v1/datasets/{dataset['id']}")
        assert (answer.status_code, answer.json()["code"]) == (409, "dataset_in_use")
        assert job in answer.json()["detail"]
        assert service.client.get(f"/v1/datasets/{dataset['id']}").json() == dataset
    service.end(job)
    for dataset in used.values():
        assert service.client.delete(f"/v1/datasets/{dataset['id']}").status_code == 204
        assert service.client.get(f"/v1/datasets/{dataset['id']}").status_code == 404
    assert service.objects.list("datasets") == []
    retried = service.client.post(f"/v1/jobs/{job}/retry")
    assert (retried.status_code, retried.json()["code"]) == (422, "dataset_not_found")


def test_the_same_content_is_the_same_work(service: Service) -> None:
    """Also under another id: results are reused by what a dataset holds."""
    texts = [
        uploaded(service, content.encode() * 300) for content in (ROW, ROW, ROW.replace("words", "terms"))
    ]
    jobs = [service.submit(calibration={"dataset": each["reference"]})["id"] for each in texts]
    prints = [service.store.load(job).fingerprint for job in jobs]
    assert prints[0] == prints[1] != prints[2]


def test_interrupted_uploads_are_garbage_after_a_day(service: Service) -> None:
    kept = uploaded(service, ROW.encode())
    for age in (timedelta(hours=1), timedelta(days=2)):
        moment = f"ds_{ULID.from_datetime(datetime.now(UTC) - age)}"
        service.objects.put(dataset_content_key(moment), b"half")
    old = f"datasets/{moment}"
    dry = service.client.post("/v1/gc", params={"dry_run": True}).json()
    assert dry["datasets"] == [old]
    assert service.client.post("/v1/gc").json()["datasets"] == [old]
    left = {head.key.split("/")[1] for head in service.objects.list("datasets")}
    assert kept["id"] in left
    assert moment not in left
    assert len(left) == 2


def test_a_worker_reads_an_upload(redis: Redis, redis_url: str, tmp_path: Path) -> None:
    """The tenant's of the job alone, with the digest of its content."""
    workshop = Workshop(redis, redis_url, tmp_path / "state")
    content = ROW.encode() * 400
    manifest = DatasetManifest(
        id=f"ds_{ULID()}", tenant="default", created_at=datetime.now(UTC), name="train.jsonl",
        size=len(content), sha256=sha256(content).hexdigest(),
        preview=text_preview.preview_of("train.jsonl", content, len(content)),
    )  # fmt: skip
    workshop.objects.put(dataset_content_key(manifest.id), content)
    DatasetStore(workshop.objects).create(workshop.context().limits, manifest)
    spec = CalibrationSpec(dataset=manifest.reference)
    settings = workshop.settings.acting_for("default")
    file = fetch_text(spec, settings, tmp_path / "calibration", lambda _: None)
    assert file is not None
    assert (file.name, file.read_bytes()) == ("calibration.jsonl", content)
    for other in (workshop.settings.acting_for("other"), workshop.settings):
        with pytest.raises(TextRefused):
            open_job_text(manifest.reference, other)
    body = JobSpec(model=MODEL, calibration=spec, recipe={"method": "rtn"}, force=True)  # type: ignore[arg-type]
    done = workshop.run(workshop.record(body))
    assert done.state is JobState.SUCCEEDED, done.error


def test_commands(service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from app.cli import main

    file = tmp_path / "train.jsonl"
    file.write_text(ROW * 30)
    access = ["--url", service.url, "--api-key", service.client.headers["authorization"].split()[1]]

    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["datasets", *arguments, *access])
        assert ended.value.code == 0
        return capsys.readouterr().out

    dataset = json.loads(said("upload", str(file), "--json"))
    shown = said("upload", str(file), "--sequence-length", "64")
    assert "30 documents" in shown
    assert "windows of 64 tokens" in shown
    assert "--dataset upload:ds_" in shown
    assert dataset["id"] in said("list")
    assert "a text of some words" in said("show", "last")
    assert json.loads(said("delete", dataset["id"], "--yes", "--json")) == {
        "id": dataset["id"], "deleted": True
    }  # fmt: skip
    assert dataset["id"] not in said("list")


def test_the_client_says_why_a_dataset_stays(service: Service) -> None:
    dataset = uploaded(service, ROW.encode() * 200)
    service.submit(calibration={"dataset": dataset["reference"]})
    with (
        NibbleClient(service.url, api_key=key_of(service)) as client,
        pytest.raises(Conflict, match="has not ended"),
    ):
        client.delete_dataset(dataset["id"])
