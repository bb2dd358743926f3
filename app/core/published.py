"""What a job has made visible in object storage: found after a crash, withdrawn if the job ends otherwise."""

from __future__ import annotations

import json

from app.core.artifact import ArtifactManifest
from app.core.errors import NotFound
from app.core.ids import artifact_id
from app.core.job import Job
from app.core.object_store import ObjectStore
from app.core.storage_keys import ARTIFACTS, manifest_key, report_key

ID_TIME = slice(4, 14)  # the part of an id that names its time, which a job and its artifacts share


def read_manifest(objects: ObjectStore, art_id: str) -> ArtifactManifest | None:
    try:
        return ArtifactManifest.model_validate_json(objects.get(manifest_key(art_id)))
    except NotFound:
        return None


def published_before(objects: ObjectStore, job: Job) -> tuple[str, ...] | None:
    """The artifacts of a job whose attempt died between its last manifest and its last record."""
    try:
        report = json.loads(objects.get(report_key(job.id)))
    except NotFound:
        return None
    published = report.get("published", range(len(job.spec.recipes)))
    ids = tuple(artifact_id(job.id, index, name) for index in published for name in job.spec.formats)
    whole = all(objects.head(manifest_key(art_id)) is not None for art_id in ids)
    return ids if ids and whole else None


def withdraw(objects: ObjectStore, job: Job) -> list[str]:
    """Remove the artifacts of a job that has ended without a result; their ids.

    An attempt that dies between the manifests of two formats has made one of them visible.
    """
    withdrawn = []
    for art_id in objects.list_folders_like(ARTIFACTS, f"art_{job.id[ID_TIME]}"):
        manifest = read_manifest(objects, art_id)
        if manifest is not None and manifest.job == job.id:
            objects.delete(manifest_key(art_id))
            objects.delete_prefix(f"{ARTIFACTS}/{art_id}")
            withdrawn.append(art_id)
    return withdrawn
