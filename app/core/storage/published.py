"""A job's published artifacts: found again after a crash, withdrawn if the job does not succeed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

from pydantic import ValidationError

from app.core.access.limits import TenantLimits
from app.core.errors import NibbleError, NotFound, RecordUnreadable
from app.core.records.artifact import ArtifactManifest
from app.core.records.ids import artifact_id
from app.core.records.job import NEAR, Job, ResultFigures
from app.core.records.specs import Kept
from app.core.storage.object_store import ObjectStore
from app.core.storage.storage_keys import ARTIFACTS, manifest_key, report_key

log = logging.getLogger(__name__)

ID_TIME = slice(4, 14)  # the part of an id that names its time, which a job and its artifacts share


class ReportHead(Kept):
    """The published recipes of a report; None means all."""

    published: tuple[int, ...] | None = None


def read_manifest(objects: ObjectStore, art_id: str) -> ArtifactManifest | None:
    """The manifest, if there is one. Raises RecordUnreadable if it is damaged or of another version."""
    try:
        content = objects.get(manifest_key(art_id))
    except NotFound:
        return None
    try:
        return ArtifactManifest.model_validate_json(content)
    except ValidationError as fault:
        raise RecordUnreadable(
            f"the manifest of {art_id} is damaged, or another version of the service wrote it",
            remedy=f"finish the upgrade, or let the operator remove artifacts/{art_id} from storage",
        ) from fault


def published_before(objects: ObjectStore, job: Job) -> tuple[str, ...] | None:
    """The artifacts of a job whose attempt died between its last manifest and its last record."""
    try:
        report = ReportHead.model_validate_json(objects.get(report_key(job.id)))
    except NotFound:
        return None
    except ValidationError:  # another attempt writes it again, and meets the manifests if there are any
        log.warning("the stored report of %s can't be read", job.id)
        return None
    ids = outputs_of(job, report.published)
    whole = all(objects.head(manifest_key(art_id)) is not None for art_id in ids)
    return ids if ids and whole else None


def outputs_of(job: Job, recipes: Iterable[int] | None = None) -> tuple[str, ...]:
    """The ids that these recipes' artifacts have, by default those of the request."""
    indices = range(len(job.spec.recipes)) if recipes is None else recipes
    return tuple(artifact_id(job.id, index, name) for index in indices for name in job.spec.formats)


def may_be_visible(objects: ObjectStore, job: Job) -> Iterable[str]:
    """At least the ids of what the job's attempts have made visible.

    A search for a target adds recipes, and each attempt may end it elsewhere: those artifacts are looked for
    by the time that is in their ids.
    """
    if job.spec.target is None:
        return outputs_of(job)
    return objects.list_folders_like(ARTIFACTS, f"art_{job.id[ID_TIME]}")


def figures_of(objects: ObjectStore, artifacts: Sequence[str]) -> ResultFigures | None:
    """Of the smallest artifact within NEAR of the original's perplexity, else of the one with the least KL.

    None if none can be read.
    """
    seen = []
    for art_id in artifacts:
        try:
            manifest = read_manifest(objects, art_id)
            if manifest is not None:
                seen.append(ResultFigures.model_validate({**manifest.summary, "bytes": manifest.size}))
        except (NibbleError, ValidationError) as fault:  # the job has succeeded all the same
            log.warning("no figures of %s: %s", art_id, fault)
    near = [each for each in seen if each.perplexity_ratio is not None and each.perplexity_ratio <= NEAR]
    if near:
        return min(near, key=lambda each: each.bytes)
    return min(seen, key=lambda each: (math.inf if each.kl is None else each.kl, each.bytes), default=None)


def count_stored(objects: ObjectStore, limits: TenantLimits, manifest: ArtifactManifest) -> None:
    """Count the artifact's bytes for its tenant, unless it is being removed."""
    limits.add_artifact(manifest.tenant, manifest.id, manifest.size)
    if objects.head(manifest_key(manifest.id)) is None:
        limits.remove_artifact(manifest.tenant, manifest.id)


def discard(objects: ObjectStore, limits: TenantLimits, manifest: ArtifactManifest) -> None:
    """Remove an artifact: the manifest before the files, so that no half of it is ever listed.

    Its bytes are subtracted before, in case this process dies, and after, in case others counted them again.
    """
    limits.remove_artifact(manifest.tenant, manifest.id)
    objects.delete(manifest_key(manifest.id))
    limits.remove_artifact(manifest.tenant, manifest.id)
    objects.delete_prefix(f"{ARTIFACTS}/{manifest.id}")


def withdraw(objects: ObjectStore, limits: TenantLimits, job: Job) -> list[str]:
    """Remove the artifacts of a job that ended without a result; returns their ids.

    An attempt that dies between the manifests of two formats has made one of them visible.
    """
    withdrawn = []
    for art_id in may_be_visible(objects, job):
        try:
            manifest = read_manifest(objects, art_id)
        except RecordUnreadable as fault:  # perhaps of another job
            log.warning("not withdrawn with %s: %s", job.id, fault.message)
            continue
        if manifest is not None and manifest.job == job.id:
            discard(objects, limits, manifest)
            withdrawn.append(art_id)
    return withdrawn
