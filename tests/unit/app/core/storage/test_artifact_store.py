"""Lists of artifacts: what is read of storage, and what is listed after a removal."""

from __future__ import annotations

from datetime import UTC, datetime

from app.core.records.artifact import ArtifactManifest
from app.core.records.ids import artifact_id, new_id
from app.core.records.specs import Recipe
from app.core.storage.artifact_store import ArtifactStore
from app.core.storage.object_store import ObjectStore
from app.core.storage.storage_keys import manifest_key


class CountingStore(ObjectStore):
    """Objects in memory, with the keys that were read."""

    def __init__(self) -> None:
        super().__init__("memory:///")
        self.read: list[str] = []

    def get(self, key: str) -> bytes:
        self.read.append(key)
        return super().get(key)

    def publish(self) -> str:
        job = new_id("job")
        manifest = ArtifactManifest(
            id=artifact_id(job, 0, "awq"), tenant="default", job=job, created_at=datetime.now(UTC),
            model="hf:org/name", model_digest="0" * 64, recipe=Recipe(), format="awq", prefix="attempt-1",
            files=(),
        )  # fmt: skip
        self.create(manifest_key(manifest.id), manifest.model_dump_json().encode())
        return manifest.id


def listed(artifacts: ArtifactStore, only: list[str] | None) -> list[str]:
    page = artifacts.page("default", limit=10, after=None, only=only)
    return [manifest.id for manifest in page.manifests]


def test_a_manifest_is_read_once_for_all_lists() -> None:
    objects = CountingStore()
    artifacts = ArtifactStore(objects)
    ids = [objects.publish() for _ in range(3)]
    uploading = artifact_id(new_id("job"), 0, "awq")
    newest_first = sorted(ids, reverse=True)
    for _ in range(2):
        assert listed(artifacts, [*ids, uploading]) == newest_first
    assert sorted(objects.read) == sorted(manifest_key(each) for each in [*ids, uploading, uploading])


def test_what_was_removed_is_not_listed_again() -> None:
    objects = CountingStore()
    artifacts = ArtifactStore(objects)
    stays, goes = objects.publish(), objects.publish()
    assert set(listed(artifacts, [stays, goes])) == {stays, goes}
    objects.delete(manifest_key(goes))
    assert listed(artifacts, [stays]) == [stays]
    assert listed(artifacts, None) == [stays], "without a count of them storage alone tells"
