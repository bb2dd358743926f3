"""Large objects through a storage that breaks: they arrive whole, or there is an error, and nothing else."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.core.errors import Unavailable
from app.core.storage.object_store import ObjectStore
from tests.faults.proxy import FaultProxy
from tests.servers import running

CONTENT = hashlib.sha256(b"large").digest() * (11 * 2**20 // 32)  # more than two parts of an upload
BREAKING = ("500", "503", "reset", "lost", "truncated")


@pytest.fixture
def proxy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    httpx.put(f"{s3_endpoint}/large").raise_for_status()
    with running(FaultProxy(s3_endpoint)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def pieces() -> Iterator[bytes]:
    for start in range(0, len(CONTENT), 2**20):
        yield CONTENT[start : start + 2**20]


@pytest.mark.parametrize("kind", BREAKING)
def test_a_large_object_arrives_whole_or_not_at_all(proxy: FaultProxy, tmp_path: Path, kind: str) -> None:
    objects, path = ObjectStore("s3://large"), tmp_path / "file"
    path.write_bytes(CONTENT)
    for number, content in enumerate((path, pieces())):
        key = f"k/{number}"
        proxy.pending.extend([kind] * 2)
        try:
            objects.put(key, content)
        except Unavailable:  # what can't be sent again is an error; the next attempt sends it
            proxy.pending.clear()
            assert objects.head(key) is None
            objects.put(key, path)
        proxy.pending.clear()
        head = objects.require(key)
        assert head.size == len(CONTENT)
        proxy.pending.append(kind)
        read = tmp_path / f"read-{number}"
        try:
            objects.download(key, read)
        except Unavailable:
            proxy.pending.clear()
            assert not read.exists()
            objects.download(key, read)
        assert read.read_bytes() == CONTENT
    assert kind in proxy.met


def test_a_commit_whose_answer_was_lost_is_not_taken_for_another_ones(proxy: FaultProxy) -> None:
    """Whoever looks again finds its own, and a later one is told that it comes second."""
    objects = ObjectStore("s3://large")
    proxy.pending.append("lost")
    with contextlib.suppress(Unavailable):  # as it looks to an attempt: nobody knows whether it is there
        objects.create("k/manifest.json", b"own")
    proxy.pending.clear()
    assert objects.get("k/manifest.json") == b"own"
    assert not objects.create("k/manifest.json", b"other")
    assert objects.get("k/manifest.json") == b"own"


def test_expired_credentials_are_the_operators_to_renew(proxy: FaultProxy) -> None:
    objects = ObjectStore("s3://large")
    proxy.pending.append("403")
    with pytest.raises(Unavailable, match="k/a") as fault:
        objects.put("k/a", b"x")
    assert fault.value.code == "storage_unavailable"
    assert "AWS_" in fault.value.remedy
    assert objects.head("k/a") is None
