from __future__ import annotations

from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import pytest

from app.core.records.artifact import ArtifactFile, ArtifactManifest
from app.core.records.ids import artifact_id, new_id
from app.core.records.specs import Recipe
from app.core.storage.artifact_store import file_key
from app.core.storage.object_store import ObjectStore
from workers.replicas.artifact_cache import ArtifactCache, ArtifactCorrupt

CONTENT = {"config.json": b"{}", "weights/a.bin": b"x" * 5000}


class Stop(Exception):
    """What a caller raises to stop."""


@pytest.fixture
def objects() -> ObjectStore:
    return ObjectStore("memory:///")


@pytest.fixture
def cache(tmp_path: Path, objects: ObjectStore) -> ArtifactCache:
    return ArtifactCache(tmp_path / "cache", objects)


def published(objects: ObjectStore, files: dict[str, bytes], **named: str) -> ArtifactManifest:
    job = new_id("job")
    paths = {named.get(path, path): content for path, content in files.items()}
    manifest = ArtifactManifest(
        id=artifact_id(job, 0, "awq"), tenant="default", job=job, created_at=datetime.now(UTC), model="m",
        model_digest="0" * 64, recipe=Recipe(), format="awq", prefix="attempt-1",
        files=tuple(ArtifactFile(path=path, size=len(content), sha256=sha256(content).hexdigest())
                    for path, content in paths.items()),
    )  # fmt: skip
    for path, content in files.items():
        objects.put(file_key(manifest, path), content)
    return manifest


def no_check() -> None:
    """Nobody asks to stop."""


def test_files_are_downloaded_once(cache: ArtifactCache, objects: ObjectStore) -> None:
    manifest = published(objects, CONTENT)
    folder = cache.fetch(manifest, no_check)
    assert {path: (folder / path).read_bytes() for path in CONTENT} == CONTENT
    objects.delete_prefix(f"artifacts/{manifest.id}")
    with cache.in_use(manifest.id):
        assert cache.fetch(manifest, no_check) == folder


def test_a_damaged_file_never_appears(cache: ArtifactCache, objects: ObjectStore, tmp_path: Path) -> None:
    manifest = published(objects, CONTENT)
    key = file_key(manifest, "weights/a.bin")
    objects.put(key, b"y" * 5000)
    with pytest.raises(ArtifactCorrupt, match=r"weights/a\.bin has SHA-256"):
        cache.fetch(manifest, no_check)
    assert not (tmp_path / "cache" / manifest.id).exists()
    objects.put(key, CONTENT["weights/a.bin"])
    assert (cache.fetch(manifest, no_check) / "weights" / "a.bin").read_bytes() == CONTENT["weights/a.bin"]


def test_a_file_that_was_cut_is_fetched_again(cache: ArtifactCache, objects: ObjectStore) -> None:
    manifest = published(objects, CONTENT)
    file = cache.fetch(manifest, no_check) / "weights" / "a.bin"
    file.write_bytes(b"x")
    assert cache.fetch(manifest, no_check) / "weights" / "a.bin" == file
    assert file.read_bytes() == CONTENT["weights/a.bin"]


def test_no_file_leaves_the_folder(cache: ArtifactCache, objects: ObjectStore) -> None:
    manifest = published(objects, {"a": b"1"}, a="../../a")
    with pytest.raises(ArtifactCorrupt, match="outside"):
        cache.fetch(manifest, no_check)


def test_a_download_can_be_stopped(cache: ArtifactCache, objects: ObjectStore) -> None:
    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        cache.fetch(published(objects, CONTENT), stop)


def test_files_in_use_are_kept(cache: ArtifactCache, objects: ObjectStore, tmp_path: Path) -> None:
    used, idle, wanted = (published(objects, CONTENT) for _ in range(3))
    for manifest in (used, idle, wanted):
        cache.fetch(manifest, no_check)
    with cache.in_use(used.id):
        cache.keep_only({wanted.id})
        left = {path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()}
        assert left == {used.id, wanted.id}
        assert not cache.drop(used.id)
    assert cache.drop(used.id)
    assert not cache.drop(used.id)
