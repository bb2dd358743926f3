"""The same model, texts and recipe lead to the artifact that was made before.

A fingerprint names contents. Two are kept for each job: one that submission can compute without reading a
weight (commits, entity tags, sizes and times), and one of the SHA-256 digests that the worker computes. The
first saves the wait in the queue; the second holds also for a copy of the model in another place.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from redis import Redis

from app.core.changes.redis_keys import result_key
from app.core.errors import NotFound
from app.core.records.specs import Frozen, JobSpec, Kept, TextSpec
from app.core.storage.object_store import ObjectStore
from app.core.storage.storage_keys import manifest_key, report_key

KEPT_S = 90 * 24 * 3600


class Contents(Frozen):
    """What a job works on, by content."""

    model: str
    calibration: str
    evaluation: str


class JobResult(Kept):
    """What a job with some fingerprint has made."""

    job: str
    artifacts: tuple[str, ...]


def package_version() -> str:
    try:
        return version("nibble")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0"


def fingerprint(spec: JobSpec, contents: Contents) -> str:
    """A digest of all that decides a job's result."""
    parts = [
        package_version(),
        contents.model_dump(),
        [recipe.model_dump(mode="json") for recipe in spec.recipes],
        sorted(spec.formats),
        without_source(spec.calibration),
        without_source(spec.evaluation),
        spec.target.model_dump(mode="json") if spec.target is not None else None,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def without_source(spec: TextSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude={"dataset", "texts"})


def text_key(spec: TextSpec) -> str:
    """What identifies a text that is bundled or in the request."""
    return hashlib.sha256(json.dumps([spec.source, spec.texts]).encode()).hexdigest()


class ReuseIndex:
    """What was made, by tenant and fingerprint."""

    def __init__(self, redis: Redis, objects: ObjectStore) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable
        self._objects = objects

    def find(self, tenant: str, contents: str) -> JobResult | None:
        """What was made and is still there, whole."""
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
        """Give the job the report of the one whose artifacts it shares, if that is still there."""
        try:
            self._objects.put(report_key(job_id), self._objects.get(report_key(result.job)))
        except NotFound:
            return
