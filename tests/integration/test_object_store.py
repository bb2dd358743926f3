from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest

from app.core.errors import InvalidRequest, NotFound, Unavailable
from app.core.storage import object_store
from app.core.storage.object_store import ObjectStore
from tests.integration.conftest import s3_client


@pytest.fixture(params=["file", "memory", "s3_endpoint", "seaweedfs_endpoint"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "file":
        return ObjectStore((tmp_path / "a folder").as_uri())
    if request.param == "memory":
        return ObjectStore("memory:///")
    s3_client(request.getfixturevalue(request.param)).create_bucket(Bucket="bucket")
    return ObjectStore("s3://bucket/some/prefix")


def test_bytes_files_and_streams_are_stored(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"from a file")
    store.put("a/bytes", b"bytes")
    store.put("a/file", tmp_path / "source")
    store.put("a/stream", iter([b"in ", b"parts"]))
    assert [store.get(f"a/{name}") for name in ("bytes", "file", "stream")] == [
        b"bytes",
        b"from a file",
        b"in parts",
    ]


# Not moto, which looks for the object and writes it in two steps.
@pytest.mark.parametrize("store", ["file", "memory", "seaweedfs_endpoint"], indirect=True)
def test_only_one_of_many_creates_an_object(store: ObjectStore) -> None:
    won: list[bytes] = []

    def create(content: bytes) -> None:
        if store.create("artifacts/a/manifest.json", content):
            won.append(content)

    threads = [threading.Thread(target=create, args=(str(index).encode(),)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get("artifacts/a/manifest.json") == won[0]


def test_ranges_are_cut_at_the_end(store: ObjectStore) -> None:
    store.put("a", b"0123456789")
    assert store.read_range("a", 2, 5) == b"234"
    assert store.read_range("a", 8, 100) == b"89"
    assert store.read_range("a", 3, 3) == b""


def test_an_object_is_streamed_and_downloaded(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "CHUNK_BYTES", 4)
    store.put("a", b"0123456789")
    assert list(store.stream("a", 1, 10)) == [b"1234", b"5678", b"9"]
    assert store.download("a", tmp_path / "copy") == 10
    assert (tmp_path / "copy").read_bytes() == b"0123456789"
    assert not (tmp_path / "copy.part").exists()


def test_an_empty_object_is_an_object(store: ObjectStore, tmp_path: Path) -> None:
    store.put("a", b"")
    assert store.require("a").size == 0
    assert store.download("a", tmp_path / "copy") == 0


def test_what_is_absent_is_not_found(store: ObjectStore, tmp_path: Path) -> None:
    assert store.head("none") is None
    assert store.list("none") == []
    assert store.list_folders("none") == []
    store.delete("none")
    for read in (store.get, store.require):
        with pytest.raises(NotFound):
            read("none")
    with pytest.raises(NotFound):
        store.download("none", tmp_path / "copy")


def test_folders_are_listed_and_deleted(store: ObjectStore) -> None:
    for key in ("a/1/x", "a/1/y/z", "a/2/x", "a/top", "ab/x"):
        store.put(key, b"1")
    assert [head.key for head in store.list("a")] == ["a/1/x", "a/1/y/z", "a/2/x", "a/top"]
    assert store.list_folders("a") == ["1", "2"]
    assert store.delete_prefix("a/1") == 2
    # SeaweedFS lists a folder that became empty until it cleans up.
    assert [name for name in store.list_folders("a") if store.list(f"a/{name}")] == ["2"]
    assert store.head("ab/x") is not None


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/.b", "a b", "a\\b", "a%2e", "a\n", "é", "a" * 901]
)
def test_keys_that_could_lead_elsewhere_are_refused(key: str) -> None:
    with pytest.raises(InvalidRequest):
        ObjectStore("memory:///").put(key, b"x")


@pytest.mark.parametrize("url", ["", "file://", "file:///", "file://host/x", "s3://", "ftp://x/y", "/folder"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="storage URL"):
        ObjectStore(url)


def test_a_signed_url_reads_without_credentials(any_s3_endpoint: str) -> None:
    s3_client(any_s3_endpoint).create_bucket(Bucket="bucket")
    store = ObjectStore("s3://bucket/prefix")
    store.put("a", b"content")
    assert store.can_presign
    assert httpx.get(store.presign("a"), timeout=30).content == b"content"


def test_a_folder_signs_nothing(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path.as_uri())
    assert not store.can_presign
    with pytest.raises(Unavailable):
        store.presign("a")


def test_storage_that_is_gone_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(Unavailable):
        ObjectStore("s3://bucket").check()
