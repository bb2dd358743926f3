"""Reuse of results: the same model, texts and recipe lead to the existing artifact.

A fingerprint names contents. Two are kept for each job: one that submission can compute without reading a
weight (commits, entity tags, sizes and times), and one of the SHA-256 digests that the worker computes. The
first saves the wait in the queue; the second holds also for a copy of the model in another place.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from redis import Redis

from app.core.changes.redis_keys import result_key
from app.core.errors import NotFound
from app.core.records.specs import Frozen, JobSpec, Kept, TextSpec
from app.core.storage.object_store import ObjectStore
from app.core.storage.storage_keys import manifest_key, report_key
from app.core.telemetry.version import package_version

KEPT_S = 90 * 24 * 3600


class Contents(Frozen):
    """Digests of a job's inputs."""

    model: str
    calibration: str
    evaluation: str | None  # None: not evaluated


class JobResult(Kept):
    """The artifacts of the job with a fingerprint."""

    job: str
    artifacts: tuple[str, ...]


def fingerprint(spec: JobSpec, contents: Contents) -> str:
    """A digest of everything that determines a job's result."""
    parts = [
        package_version(),
        contents.model_dump(),
        [recipe.model_dump(mode="json") for recipe in spec.recipes],
        sorted(spec.formats),
        without_source(spec.calibration),
        None
        if spec.evaluation is None
        else {**without_source(spec.evaluation), "sequence_length": spec.evaluation_length},
        spec.target.model_dump(mode="json") if spec.target is not None else None,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def without_source(spec: TextSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude={"dataset", "texts"})


def text_key(spec: TextSpec) -> str:
    """A digest of a text that is bundled or in the request."""
    return hashlib.sha256(json.dumps([spec.source, spec.texts]).encode()).hexdigest()


class ReuseIndex:
    """Results by tenant and fingerprint."""

    def __init__(self, redis: Redis, objects: ObjectStore) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable
        self._objects = objects

    def find(self, tenant: str, contents: str) -> JobResult | None:
        """The result, if all of its artifacts still exist."""
        record = self._redis.get(result_key(tenant, contents))
        if record is None:
            return None
        result = JobResult.model_validate_json(record)
        is_whole = all(
            self._objects.head(manifest_key(artifact)) is not None for artifact in result.artifacts
        )
        return result if is_whole and result.artifacts else None

    def note(self, tenant: str, contents: str, result: JobResult) -> None:
        self._redis.set(result_key(tenant, contents), result.model_dump_json(), ex=KEPT_S)

    def copy_report(self, result: JobResult, job_id: str) -> None:
        """Copy the report of the job that made the artifacts, if it still exists."""
        try:
            self._objects.put(report_key(job_id), self._objects.get(report_key(result.job)))
        except NotFound:
            return
