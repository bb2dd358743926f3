"""Published artifacts, listed by their manifests: without a manifest an artifact does not exist.

artifacts/<id>/manifest.json        the commit point, created once
artifacts/<id>/<prefix>/<path>      the files
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from functools import lru_cache

from app.core.errors import NotFound, RecordUnreadable
from app.core.records.artifact import ArtifactFile, ArtifactManifest
from app.core.records.ids import check_cursor, is_id
from app.core.records.specs import Frozen
from app.core.storage.object_store import ObjectStore
from app.core.storage.published import read_manifest
from app.core.storage.storage_keys import ARTIFACTS

log = logging.getLogger(__name__)

MOST_READ = 1000  # manifests that a process keeps for lists: they never change


class ArtifactPage(Frozen):
    manifests: tuple[ArtifactManifest, ...]
    has_more: bool


def artifact_folder(artifact_id: str) -> str:
    return f"{ARTIFACTS}/{artifact_id}"


def file_key(manifest: ArtifactManifest, path: str) -> str:
    return f"{artifact_folder(manifest.id)}/{manifest.prefix}/{path}"


def missing(what: str) -> NotFound:
    return NotFound(
        f"there is no artifact {what[:200]}",
        code="artifact_not_found",
        remedy="`nibble artifacts` and GET /v1/artifacts list yours, `nibble artifacts show` their files",
    )


def named_file(manifest: ArtifactManifest, path: str) -> tuple[ArtifactManifest, ArtifactFile]:
    for file in manifest.files:
        if file.path == path:
            return manifest, file
    raise missing(f"file {manifest.id}/{path}")


class ArtifactStore:
    """Reads artifacts. Workers publish them."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._manifest = lru_cache(MOST_READ)(self._read)

    def get(self, tenant: str, artifact_id: str) -> ArtifactManifest:
        """The manifest; NotFound also for another tenant's."""
        manifest = read_manifest(self._objects, artifact_id) if is_id("art", artifact_id) else None
        if manifest is None or manifest.tenant != tenant:
            raise missing(artifact_id)
        return manifest

    def file(self, tenant: str, artifact_id: str, path: str) -> tuple[ArtifactManifest, ArtifactFile]:
        """A file that the manifest names; any other path is NotFound."""
        return named_file(self.get(tenant, artifact_id), path)

    def linked_file(self, artifact_id: str, path: str) -> tuple[ArtifactManifest, ArtifactFile]:
        """As `file`, for the holder of a link, without a tenant."""
        manifest = read_manifest(self._objects, artifact_id) if is_id("art", artifact_id) else None
        if manifest is None:
            raise missing(artifact_id)
        return named_file(manifest, path)

    def page(
        self, tenant: str, *, limit: int, after: str | None, only: Collection[str] | None = None
    ) -> ArtifactPage:
        """The tenant's artifacts, newest first, older than the id `after`.

        `only`: the ids among which they are; None looks through all of storage.
        """
        check_cursor("art", after)
        manifests: list[ArtifactManifest] = []
        for manifest in self._newest_first(after, only):
            if manifest.tenant == tenant:
                manifests.append(manifest)
            if len(manifests) > limit:
                break
        return ArtifactPage(manifests=tuple(manifests[:limit]), has_more=len(manifests) > limit)

    def _newest_first(self, after: str | None, only: Collection[str] | None) -> Iterator[ArtifactManifest]:
        if only is None:  # a folder outlives its manifest while it is removed
            ids, read = self._objects.list_folders(ARTIFACTS), self._read
        else:
            ids, read = sorted(only), self._manifest
        for artifact_id in reversed(ids):
            if is_id("art", artifact_id) and (after is None or artifact_id < after):
                try:
                    yield read(artifact_id)
                except RecordUnreadable as fault:
                    log.warning("left out of a list: %s", fault.message)
                except NotFound:  # an attempt still uploads, or was lost
                    continue

    def _read(self, artifact_id: str) -> ArtifactManifest:
        manifest = read_manifest(self._objects, artifact_id)
        if manifest is None:
            raise missing(artifact_id)
        return manifest
