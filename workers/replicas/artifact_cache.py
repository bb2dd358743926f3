"""An artifact's files on this host: downloaded once, each checked against its manifest's SHA-256."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from app.core.errors import NibbleError
from app.core.records.artifact import ArtifactFile, ArtifactManifest
from app.core.sources.fetching import exclusive
from app.core.storage.artifact_store import file_key
from app.core.storage.object_store import ObjectStore

log = logging.getLogger(__name__)

Check = Callable[[], None]  # called often; may raise to stop


class ArtifactCorrupt(NibbleError):
    code = "artifact_corrupt"


class ArtifactCache:
    """Artifacts below a folder that all workers of a host share."""

    def __init__(self, folder: Path, objects: ObjectStore) -> None:
        self._folder = folder
        self._objects = objects

    def fetch(self, manifest: ArtifactManifest, check: Check) -> Path:
        """The artifact's folder, which appears when every file in it was checked."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        target = self._folder / manifest.id
        if holds(target, manifest):  # without the lock, which users of the files share
            return target
        with exclusive(self._lock(manifest.id), lambda _: check()):
            if not holds(target, manifest):
                shutil.rmtree(target, ignore_errors=True)
                self._download(manifest, target.with_name(f"{manifest.id}.partial"), check).rename(target)
        return target

    @contextmanager
    def in_use(self, artifact_id: str) -> Iterator[None]:
        """Keep the files while the block runs; `drop` leaves them alone then, in any process."""
        with self._lock(artifact_id).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    def keep_only(self, artifact_ids: Collection[str]) -> None:
        """Remove what earlier processes have left of other artifacts."""
        for path in self._folder.glob("art_*") if self._folder.is_dir() else ():
            artifact_id = path.name.partition(".")[0]
            if path.is_dir() and artifact_id not in artifact_ids:
                self.drop(path.name)

    def drop(self, artifact_id: str) -> bool:
        """Remove an artifact's files unless someone on this host uses them."""
        if not (self._folder / artifact_id).exists():
            return False
        with self._lock(artifact_id).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            shutil.rmtree(self._folder / artifact_id, ignore_errors=True)
        return True

    def _lock(self, artifact_id: str) -> Path:
        return self._folder / f"{artifact_id}.lock"

    def _download(self, manifest: ArtifactManifest, stage: Path, check: Check) -> Path:
        for file in manifest.files:
            path = stage / relative(file)
            # A file that an earlier try finished was checked before it got its name.
            if path.exists() and path.stat().st_size == file.size:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            self._download_file(file_key(manifest, file.path), file, path, check)
        return stage

    def _download_file(self, key: str, file: ArtifactFile, path: Path, check: Check) -> None:
        digest, part = hashlib.sha256(), path.with_name(path.name + ".part")
        with part.open("wb") as out:
            for chunk in self._objects.stream(key, 0, file.size):
                check()
                out.write(chunk)
                digest.update(chunk)
        if digest.hexdigest() != file.sha256:
            part.unlink()
            raise ArtifactCorrupt(
                f"{file.path} has SHA-256 {digest.hexdigest()}; its manifest says {file.sha256}",
                remedy="the stored file is damaged: run the job again and deploy its artifact",
            )
        part.replace(path)


def holds(folder: Path, manifest: ArtifactManifest) -> bool:
    """True if every file is there in its size; contents were checked before the folder got its name."""
    paths = {folder / relative(file): file.size for file in manifest.files}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def relative(file: ArtifactFile) -> PurePosixPath:
    path = PurePosixPath(file.path)
    if path.is_absolute() or ".." in path.parts:
        raise ArtifactCorrupt(f"the manifest names the file {file.path[:200]!r}, outside of its folder")
    return path
