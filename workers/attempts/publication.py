"""Publishes what a job made: immutable files first, then one conditional write that makes them exist.

Artifact ids follow from the job, so two attempts meet at the same manifest: the first one counts, and the
other removes its files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from app.core.child.assignment import Finished, OutputFolder
from app.core.errors import JobFault, NibbleError, Unavailable
from app.core.records.artifact import ArtifactFile, ArtifactManifest
from app.core.records.ids import artifact_id
from app.core.records.job import Job
from app.core.sources.fetching import FetchedModel
from app.core.sources.file_digest import file_sha256
from app.core.storage.object_store import ObjectStore
from app.core.storage.published import read_manifest
from app.core.storage.storage_keys import manifest_key, report_key

log = logging.getLogger(__name__)


class Publication:
    """The outputs of one attempt on their way into object storage."""

    def __init__(self, objects: ObjectStore, job: Job, *, model: FetchedModel, work_folder: Path) -> None:
        self._objects = objects
        self._job = job
        self._model = model
        self._work_folder = work_folder
        self._prefix = f"attempt-{job.attempt}"

    def publish(
        self, finished: Finished, *, check: Callable[[], None], before_commit: Callable[[], None]
    ) -> tuple[str, ...]:
        """The ids of the published artifacts.

        `check`, often, and `before_commit`, once, may raise to stop. The first manifest is the commit point.
        """
        with self._unpublished_removed(finished):
            manifests = [self._upload(output, check) for output in finished.outputs]
            report = inside(self._work_folder, finished.report)
            self._objects.put(report_key(self._job.id), report)
            before_commit()
            for manifest in manifests:
                self._commit(manifest)
        for manifest in manifests:
            self._remove_unpublished(manifest.id)
        return tuple(manifest.id for manifest in manifests)

    def _commit(self, manifest: ArtifactManifest) -> None:
        """Make the artifact exist, or find it existing.

        A storage that says "exists already" may mean a write of ours whose answer was lost, or be wrong.
        """
        self._objects.create(manifest_key(manifest.id), manifest.model_dump_json().encode())
        if read_manifest(self._objects, manifest.id) is None:
            raise Unavailable(
                f"object storage refused the manifest of {manifest.id}, but has none",
                code="storage_inconsistent",
                remedy="check that the storage supports If-None-Match",
            )

    def _upload(self, output: OutputFolder, check: Callable[[], None]) -> ArtifactManifest:
        art_id = artifact_id(self._job.id, output.recipe_index, output.format)
        folder = inside(self._work_folder, output.folder)
        files = []
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            check()
            name = path.relative_to(folder).as_posix()
            # Hashed from the local file: a wrong upload then differs from its manifest.
            files.append(ArtifactFile(path=name, size=path.stat().st_size, sha256=file_sha256(path, check)))
            self._objects.put(f"artifacts/{art_id}/{self._prefix}/{name}", path)
        if not files:
            raise JobFault(f"the output folder {output.folder} is empty", code="child_protocol")
        return ArtifactManifest(
            id=art_id,
            tenant=self._job.tenant,
            job=self._job.id,
            created_at=datetime.now(UTC),
            model=self._job.spec.model,
            model_digest=self._model.digest,
            adapter=self._job.spec.adapter,
            adapter_digest=None if self._model.adapter is None else self._model.adapter.digest,
            recipe=output.recipe or self._job.spec.recipes[output.recipe_index],
            format=output.format,
            prefix=self._prefix,
            summary=output.summary,
            files=tuple(files),
        )

    @contextmanager
    def _unpublished_removed(self, finished: Finished) -> Iterator[None]:
        """If publishing is stopped, leave no files that no manifest names."""
        try:
            yield
        except BaseException:
            for output in finished.outputs:
                self._remove_unpublished(artifact_id(self._job.id, output.recipe_index, output.format))
            raise

    def _remove_unpublished(self, art_id: str) -> None:
        """Remove the files that the manifest doesn't name, this attempt's alone while there is none.

        Whether that works changes nothing about the job: what is left is garbage, which is collected.
        """
        try:
            manifest = read_manifest(self._objects, art_id)
            prefixes = (
                [self._prefix] if manifest is None else self._objects.list_folders(f"artifacts/{art_id}")
            )
            for prefix in prefixes:
                if manifest is None or prefix != manifest.prefix:
                    self._objects.delete_prefix(f"artifacts/{art_id}/{prefix}")
        except NibbleError as fault:
            log.warning("left to the collection of garbage: %s", fault.message, extra={"job": self._job.id})


def inside(folder: Path, relative: str) -> Path:
    """A path that the child names. It must exist, inside its work folder."""
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.exists():
        raise JobFault(
            f"the job's process names {relative!r}, which is not in its folder", code="child_protocol"
        )
    return path
