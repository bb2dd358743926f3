"""Which artifact stands for a job in lists."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from app.core.records.artifact import ArtifactFile, ArtifactManifest
from app.core.records.ids import artifact_id, new_id
from app.core.records.specs import Recipe
from app.core.storage.object_store import ObjectStore
from app.core.storage.published import figures_of
from app.core.storage.storage_keys import manifest_key


def published(objects: ObjectStore, summaries: list[dict[str, Any]]) -> list[str]:
    """Artifacts with these summaries, of 100, 90, 80, … bytes; their ids."""
    job, ids = new_id("job"), []
    for index, summary in enumerate(summaries):
        file = ArtifactFile(path="a", size=100 - 10 * index, sha256="0" * 64)
        manifest = ArtifactManifest(
            id=artifact_id(job, index, "awq"), tenant="t", job=job, created_at=datetime.now(UTC), model="a/b",
            model_digest="0" * 64, recipe=Recipe(), format="awq", prefix="p", files=(file,), summary=summary,
        )  # fmt: skip
        objects.create(manifest_key(manifest.id), manifest.model_dump_json().encode())
        ids.append(manifest.id)
    return ids


@pytest.mark.parametrize(
    ("summaries", "expected"),
    [
        (
            [{"perplexity_ratio": 1.0, "kl": 0.001}, {"perplexity_ratio": 1.009, "kl": 0.01}],
            90,
        ),  # smallest near
        ([{"perplexity_ratio": 1.02, "kl": 0.01}, {"perplexity_ratio": 1.2, "kl": 0.2}], 100),  # none is near
        ([{"label": "rtn fp8", "bytes": 3}, {"label": "rtn w4"}], 90),  # not evaluated
        ([{"perplexity_ratio": "x"}, {"kl": 0.1}], 90),  # one that can't be read
    ],
)
def test_the_smallest_near_the_original_stands_for_a_job(
    summaries: list[dict[str, Any]], expected: int
) -> None:
    objects = ObjectStore("memory:///")
    figures = figures_of(objects, published(objects, summaries))
    assert figures is not None
    assert figures.bytes == expected


def test_a_job_without_artifacts_has_no_figures() -> None:
    assert figures_of(ObjectStore("memory:///"), ["art_01M8ERG05NKHQNMYA0VV1Z5G1N"]) is None
