"""Removes unreferenced folders from object storage, and job records older than the retention time.

Nothing that a running attempt could still need is removed: jobs are read after storage was listed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from app.core.access.limits import TenantLimits
from app.core.errors import Conflict, NotFound, RecordUnreadable
from app.core.jobs.job_store import JobStore
from app.core.records.artifact import ArtifactManifest
from app.core.records.ids import created_at, is_id
from app.core.records.job import TERMINAL, Job, JobState
from app.core.records.specs import Frozen
from app.core.settings import Settings
from app.core.storage.dataset_store import DatasetStore
from app.core.storage.object_store import ObjectStore
from app.core.storage.published import ID_TIME, count_stored, discard, read_manifest
from app.core.storage.storage_keys import (
    ARTIFACTS,
    CHECKPOINTS,
    DATASETS,
    checkpoint_prefix,
    dataset_folder,
    report_key,
)
from app.core.storage.tags import Tags

log = logging.getLogger(__name__)

# How long a failed job's checkpoints are kept for a retry.
CHECKPOINTS_KEPT = timedelta(days=7)
UPLOADS_LAST = timedelta(days=1)
ACTIVE = (JobState.QUEUED, JobState.RUNNING, JobState.CANCELLING)


class Garbage(Frozen):
    """Folders of storage, and records of jobs, that were or would be removed."""

    checkpoints: tuple[str, ...]
    artifacts: tuple[str, ...]
    jobs: tuple[str, ...]
    datasets: tuple[str, ...] = ()  # uploads that were interrupted

    @property
    def count(self) -> int:
        return len(self.checkpoints) + len(self.artifacts) + len(self.jobs) + len(self.datasets)


class GarbageCollector:
    def __init__(
        self, store: JobStore, objects: ObjectStore, limits: TenantLimits, tags: Tags, settings: Settings
    ) -> None:
        self._store = store
        self._objects = objects
        self._limits = limits
        self._tags = tags
        self._in_order: set[str] = set()  # artifacts that are counted and will never be garbage
        self._kept = timedelta(days=settings.retention_days) if settings.retention_days else None

    def collect(self, *, dry_run: bool = False) -> Garbage:
        """Find garbage and remove it, unless it's a dry run."""
        now = datetime.now(UTC)
        garbage = Garbage(
            checkpoints=tuple(self._stale_checkpoints(now)),
            artifacts=tuple(self._orphans()),
            jobs=tuple(job.id for job in self._old_jobs(now)),
            datasets=tuple(self._interrupted_uploads(now)),
        )
        if not dry_run:
            self._remove(garbage)
        self._limits.all_are_counted()
        return garbage

    def _remove(self, garbage: Garbage) -> None:
        for folder in (*garbage.checkpoints, *garbage.datasets):
            self._objects.delete_prefix(folder)
        for folder in garbage.artifacts:
            self._remove_artifact(folder)
        for job_id in garbage.jobs:
            try:
                job = self._store.load(job_id)
                self._store.delete(job.tenant, job_id)
            except (NotFound, Conflict, RecordUnreadable):  # deleted already, or not settled yet
                continue
            self._objects.delete(report_key(job_id))
            self._objects.delete_prefix(checkpoint_prefix(job_id))
        if garbage.count:
            log.info("removed %d folders and records that nothing refers to", garbage.count)

    def _remove_artifact(self, folder: str) -> None:
        """Remove a folder of artifacts; a whole one with its manifest first."""
        art_id = folder.removeprefix(f"{ARTIFACTS}/")
        manifest = read_manifest(self._objects, art_id) if is_id("art", art_id) else None
        if manifest is not None:
            discard(self._objects, self._limits, manifest)
        else:
            self._objects.delete_prefix(folder)

    def _find(self, job_id: str) -> Job | None:
        """The job, if there is one. Raises RecordUnreadable for one of another version."""
        try:
            return self._store.load(job_id)
        except NotFound:
            return None

    def _stale_checkpoints(self, now: datetime) -> Iterator[str]:
        for job_id in self._objects.list_folders(CHECKPOINTS):
            with left_alone():
                job = self._find(job_id)
                if job is None or not needs_checkpoints(job, now):
                    yield checkpoint_prefix(job_id)

    def _interrupted_uploads(self, now: datetime) -> Iterator[str]:
        """Folders of datasets without a manifest, once no upload can go on; what has one is counted."""
        datasets = DatasetStore(self._objects)
        for dataset_id in self._objects.list_folders(DATASETS):
            if not is_id("ds", dataset_id):
                continue
            with left_alone():
                manifest = datasets.find(dataset_id)
                if manifest is not None:
                    self._limits.add_artifact(manifest.tenant, manifest.id, manifest.size)
                    if datasets.find(dataset_id) is None:  # deleted meanwhile
                        self._limits.remove_artifact(manifest.tenant, manifest.id)
                elif now - created_at(dataset_id) > UPLOADS_LAST:
                    yield dataset_folder(dataset_id)

    def _orphans(self) -> Iterator[str]:
        """Folders without a manifest, and artifacts whose job ended without a result."""
        listed = [name for name in self._objects.list_folders(ARTIFACTS) if is_id("art", name)]
        # Read in one step, so that a job that changes its state meanwhile is not missed.
        times = {job_id[ID_TIME] for job_id in self._store.in_state(*ACTIVE)}
        self._in_order.intersection_update(listed)
        for art_id in listed:
            if art_id not in self._in_order:
                with left_alone():
                    yield from self._of_no_use(art_id, may_be_worked_on=art_id[ID_TIME] in times)

    def _of_no_use(self, art_id: str, *, may_be_worked_on: bool) -> Iterator[str]:
        manifest = read_manifest(self._objects, art_id)
        if manifest is None:
            if not may_be_worked_on:
                yield f"{ARTIFACTS}/{art_id}"
            return
        job = self._find(manifest.job)
        if job is not None and job.has_no_result:
            if tags := self._tags.of(manifest):
                log.warning("left alone: %s has the tags %s", art_id, ", ".join(sorted(tags)))
                count_stored(self._objects, self._limits, manifest)
            else:
                yield f"{ARTIFACTS}/{art_id}"
            return
        # Artifacts of deleted jobs stay; those of a job that goes on are counted when it has succeeded.
        is_over = job is None or job.is_terminal
        if is_over:
            count_stored(self._objects, self._limits, manifest)
        if not may_be_worked_on:
            others = list(self._other_attempts(manifest))
            yield from others
            if is_over and not others:
                self._in_order.add(art_id)

    def _other_attempts(self, manifest: ArtifactManifest) -> Iterator[str]:
        for prefix in self._objects.list_folders(f"{ARTIFACTS}/{manifest.id}"):
            if prefix != manifest.prefix:
                yield f"{ARTIFACTS}/{manifest.id}/{prefix}"

    def _old_jobs(self, now: datetime) -> Iterator[Job]:
        if self._kept is None:
            return
        latest = now - self._kept
        for job_id in sorted(set(self._store.recorded_before(latest, *TERMINAL))):
            with left_alone():
                job = self._find(job_id)
                if job is not None and job.finished_at is not None and job.finished_at < latest:
                    yield job


@contextmanager
def left_alone() -> Iterator[None]:
    """Skip, with a log line, what can't be read: it may still be of use."""
    try:
        yield
    except RecordUnreadable as fault:
        log.warning("left alone: %s", fault.message)


def needs_checkpoints(job: Job, now: datetime) -> bool:
    is_old = job.finished_at is not None and now - job.finished_at >= CHECKPOINTS_KEPT
    return job.may_need_checkpoints and not is_old
