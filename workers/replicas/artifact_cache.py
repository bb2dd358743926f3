"""An artifact's files on this host: downloaded once, each checked against its manifest's SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath

from app.core.errors import NibbleError
from app.core.records.artifact import ArtifactFile, ArtifactManifest
from app.core.storage.artifact_store import file_key
from app.core.storage.cached_folders import CachedFolders, Check
from app.core.storage.object_store import ObjectStore


class ArtifactCorrupt(NibbleError):
    """A file of the artifact is not the one that was published."""

    code = "artifact_corrupt"


class ArtifactCache:
    """Artifacts below a folder that all workers of a host share."""

    def __init__(self, folder: Path, objects: ObjectStore) -> None:
        self._folders = CachedFolders(folder)
        self._objects = objects

    def fetch(self, manifest: ArtifactManifest, check: Check) -> Path:
        """The artifact's folder, which appears when every file in it was checked."""
        files = {str(relative(file)): file for file in manifest.files}
        sizes = {path: file.size for path, file in files.items()}

        def download(path: str, partial: Path) -> None:
            self._download(file_key(manifest, files[path].path), files[path], partial, check)

        with self._folders.locked(manifest.id, check):
            return self._folders.fill(manifest.id, sizes, download)

    def in_use(self, artifact_id: str) -> AbstractContextManager[None]:
        """Keep the files while the block runs; `drop` leaves them alone then, in any process."""
        return self._folders.in_use(artifact_id)

    def keep_only(self, artifact_ids: Collection[str]) -> None:
        """Remove the files of other artifacts that earlier processes left."""
        for path in self._folders.root.glob("art_*"):
            if path.is_dir() and path.name.partition(".")[0] not in artifact_ids:
                self.drop(path.name)

    def drop(self, artifact_id: str) -> bool:
        """Remove an artifact's files unless someone on this host uses them."""
        return self._folders.remove(artifact_id)

    def _download(self, key: str, file: ArtifactFile, partial: Path, check: Check) -> None:
        digest = hashlib.sha256()
        with partial.open("wb") as out:
            for chunk in self._objects.stream(key, 0, file.size):
                check()
                out.write(chunk)
                digest.update(chunk)
        if digest.hexdigest() != file.sha256:
            partial.unlink()
            raise ArtifactCorrupt(
                f"{file.path} has SHA-256 {digest.hexdigest()}; its manifest says {file.sha256}",
                remedy="the stored file is damaged: run the job again and deploy its artifact",
            )


def relative(file: ArtifactFile) -> PurePosixPath:
    path = PurePosixPath(file.path)
    if path.is_absolute() or ".." in path.parts:
        raise ArtifactCorrupt(f"the manifest names the file {file.path[:200]!r}, outside of its folder")
    return path
