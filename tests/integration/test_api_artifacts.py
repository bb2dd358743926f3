from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from app.core.access.links import LinkSigner
from app.core.records.artifact import ArtifactManifest
from app.core.records.ids import new_id
from app.core.settings import Settings
from app.core.storage.artifact_store import file_key
from app.core.storage.storage_keys import manifest_key
from tests.integration.api_service import ADMIN_KEY, EXAMPLES, Service, running_service

WEIGHTS = bytes(range(256)) * 50_000  # more than one chunk of a stream
FILES = {"config.json": b'{"a": 1}', "model.safetensors": WEIGHTS, "empty.txt": b""}


@pytest.fixture
def artifact(service: Service) -> ArtifactManifest:
    job_id = service.submit()["id"]
    service.end(job_id)
    return service.publish(job_id, FILES)


def route(artifact: ArtifactManifest, path: str = "model.safetensors") -> str:
    return f"/v1/artifacts/{artifact.id}/files/{path}"


def test_an_artifact_names_its_files(service: Service, artifact: ArtifactManifest) -> None:
    found = service.client.get(f"/v1/artifacts/{artifact.id}").json()
    assert found["id"] == artifact.id
    assert found["size"] == sum(map(len, FILES.values()))
    assert {file["path"]: file["sha256"] for file in found["files"]} == {
        path: sha256(content).hexdigest() for path, content in FILES.items()
    }
    assert not {"tenant", "prefix"} & set(found)


def test_artifacts_are_listed_newest_first(service: Service) -> None:
    jobs = [service.submit()["id"] for _ in range(3)]
    ids = [service.publish(job, {}).id for job in jobs]
    service.objects.put(f"artifacts/{new_id('art')}/attempt-1/half", b"not committed")
    first = service.client.get("/v1/artifacts", params={"limit": 2}).json()
    assert (first["has_more"], first["next"]) == (True, first["data"][-1]["id"])
    second = service.client.get("/v1/artifacts", params={"after": first["next"]}).json()
    assert [found["id"] for found in first["data"] + second["data"]] == sorted(ids, reverse=True)
    assert not second["has_more"]


def test_a_damaged_manifest_is_named_and_hides_no_other(service: Service, artifact: ArtifactManifest) -> None:
    damaged = service.publish(service.submit()["id"], FILES)
    service.objects.put(manifest_key(damaged.id), b'{"id": "art')
    assert [found["id"] for found in service.client.get("/v1/artifacts").json()["data"]] == [artifact.id]
    answer = service.client.get(f"/v1/artifacts/{damaged.id}")
    assert (answer.status_code, answer.json()["code"]) == (503, "record_unreadable")
    assert damaged.id in answer.json()["remedy"]


@pytest.mark.parametrize("path", list(FILES))
def test_a_file_is_downloaded_whole(service: Service, artifact: ArtifactManifest, path: str) -> None:
    answer = service.client.get(route(artifact, path))
    assert (answer.status_code, answer.content) == (200, FILES[path])
    assert answer.headers["etag"] == f'"{sha256(FILES[path]).hexdigest()}"'
    assert answer.headers["accept-ranges"] == "bytes"
    head = service.client.head(route(artifact, path))
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(FILES[path]))
    assert head.headers["etag"] == answer.headers["etag"]


@pytest.mark.parametrize(
    ("header", "part", "content_range"),
    [
        ("bytes=0-9", slice(0, 10), "bytes 0-9/12800000"),
        ("bytes=12799990-", slice(-10, None), "bytes 12799990-12799999/12800000"),
        ("bytes=-5", slice(-5, None), "bytes 12799995-12799999/12800000"),
    ],
)
def test_a_range_is_downloaded(
    service: Service, artifact: ArtifactManifest, header: str, part: slice, content_range: str
) -> None:
    answer = service.client.get(route(artifact), headers={"Range": header})
    assert (answer.status_code, answer.content) == (206, WEIGHTS[part])
    assert answer.headers["content-range"] == content_range


def test_a_range_beyond_the_end_is_refused(service: Service, artifact: ArtifactManifest) -> None:
    answer = service.client.get(route(artifact), headers={"Range": "bytes=12800000-"})
    assert (answer.status_code, answer.headers["content-range"]) == (416, "bytes */12800000")


def test_a_range_of_another_version_gives_all(service: Service, artifact: ArtifactManifest) -> None:
    headers = {"Range": "bytes=0-1", "If-Range": '"another"'}
    assert service.client.get(route(artifact, "config.json"), headers=headers).status_code == 200
    headers["If-Range"] = service.client.head(route(artifact, "config.json")).headers["etag"]
    assert service.client.get(route(artifact, "config.json"), headers=headers).status_code == 206


def test_a_file_that_the_caller_has_is_not_sent(service: Service, artifact: ArtifactManifest) -> None:
    etag = service.client.head(route(artifact)).headers["etag"]
    for method in ("GET", "HEAD"):
        answer = service.client.request(method, route(artifact), headers={"If-None-Match": etag})
        assert (answer.status_code, answer.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["none", "manifest.json", "../manifest.json", "%2e%2e/manifest.json", "", "/etc/passwd"]
)
def test_only_files_of_the_manifest_exist(service: Service, artifact: ArtifactManifest, path: str) -> None:
    assert service.client.get(route(artifact, path)).status_code == 404


@pytest.mark.parametrize(
    "artifact_id", ["art_01M823S510V90K76AWVS8MS1FM", "job_01M823S510D0DJEWVM94T0ZK2G", "x", "..%2f..%2fx"]
)
def test_what_is_no_artifact_answers_404(service: Service, artifact_id: str) -> None:
    answer = service.client.get(f"/v1/artifacts/{artifact_id}")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


def test_a_deleted_artifact_leaves_nothing(service: Service, artifact: ArtifactManifest) -> None:
    assert service.client.delete(f"/v1/artifacts/{artifact.id}").status_code == 204
    assert service.client.get(f"/v1/artifacts/{artifact.id}").status_code == 404
    assert service.client.get(route(artifact)).status_code == 404
    assert service.objects.list("artifacts") == []


def test_s3_answers_with_a_signed_redirect(redis_url: str, s3_endpoint: str, tmp_path: Path) -> None:
    httpx.put(f"{s3_endpoint}/bucket", timeout=30)
    settings = Settings(
        state_dir=tmp_path, redis_url=redis_url, storage_url="s3://bucket/nibble", model_roots=(EXAMPLES,),
        bootstrap_api_key=ADMIN_KEY,
    )  # fmt: skip
    with running_service(settings) as service:
        artifact = service.publish(service.submit()["id"], FILES)
        answer = service.client.get(route(artifact))
        head = service.client.head(route(artifact))
        listed = service.client.get("/v1/artifacts").json()
    assert answer.status_code == 307
    part = httpx.get(answer.headers["location"], headers={"Range": "bytes=0-9"}, timeout=30)
    assert (part.status_code, part.content) == (206, WEIGHTS[:10])
    assert head.headers["content-length"] == str(len(WEIGHTS))
    assert [found["id"] for found in listed["data"]] == [artifact.id]


def test_a_link_reads_one_file_without_a_key_until_it_expires(service: Service) -> None:
    artifact = service.publish(service.submit()["id"], {"a.json": b"{}", "b": b"12345"})
    made = service.client.post(f"/v1/artifacts/{artifact.id}/links", json={"path": "b"}).json()
    with service.client_with(None) as stranger:
        assert stranger.get(made["url"]).content == b"12345"
        part = stranger.get(made["url"], headers={"Range": "bytes=1-2"})
        assert (part.status_code, part.content) == (206, b"23")
        for changed in (
            made["url"].replace("/b?", "/a.json?"),
            made["url"].replace("expires=", "expires=9"),
            made["url"][:-64] + "0" * 64,
        ):
            refused = stranger.get(changed)
            assert (refused.status_code, refused.json()["code"]) == (403, "link_invalid")
        expired = LinkSigner(service.redis).path(artifact.id, "b", lasts_s=-1)
        assert stranger.get(expired).json()["code"] == "link_invalid"
    missing = service.client.post(f"/v1/artifacts/{artifact.id}/links", json={"path": "c"})
    assert missing.status_code == 404


def test_ranges_make_up_the_file_of_the_manifest(service: Service, artifact: ArtifactManifest) -> None:
    """As a download does that was cut and goes on: the whole has the manifest's SHA-256."""
    read, size, tag = b"", len(WEIGHTS), ""
    while len(read) < size:
        last = min(len(read) + 3_000_001, size) - 1
        headers = {"Range": f"bytes={len(read)}-{last}", **({"If-Range": tag} if tag else {})}
        answer = service.client.get(route(artifact), headers=headers)
        assert answer.status_code == 206
        tag = answer.headers["etag"]
        assert answer.headers["content-range"] == f"bytes {len(read)}-{last}/{size}"
        read += answer.content
    named = {file.path: file.sha256 for file in artifact.files}["model.safetensors"]
    assert sha256(read).hexdigest() == named == tag.strip('"')


def test_a_range_of_a_file_that_was_cut_is_an_error(service: Service, artifact: ArtifactManifest) -> None:
    service.objects.put(file_key(artifact, "model.safetensors"), WEIGHTS[:-1])
    for headers in ({"Range": "bytes=0-9"}, {"Range": "bytes=-5"}, {}):
        answer = service.client.get(route(artifact), headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_corrupt")


def test_a_damaged_file_is_not_sent_whole(service: Service) -> None:
    artifact = service.publish(service.submit()["id"], {"model.safetensors": b"weights"})
    service.objects.put(file_key(artifact, "model.safetensors"), b"weighty")
    with pytest.raises(httpx.RemoteProtocolError):
        service.client.get(f"/v1/artifacts/{artifact.id}/files/model.safetensors")
