"""A job as flat names and values, for experiment trackers.

The names fit MLflow's rules (letters, digits and `_ - . / space`, at most 250 characters; values of params at
most 6000) and W&B's, whose config and summary take any. Figures of several recipes have the recipe's index
before their name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from app.core.records.job import Job
from app.core.records.specs import Frozen

LONGEST_NAME = 250
LONGEST_VALUE = 6000
OTHER = re.compile(r"[^A-Za-z0-9_\-. /]")


class FlatJob(Frozen):
    """What `mlflow.log_params`, `log_metrics` and `set_tags` take."""

    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    artifacts: dict[str, str]  # id to path in the API


def flat_job(job: Job, report: Mapping[str, Any] | None) -> FlatJob:
    """The job's spec as params, the report's figures as metrics. `report`: None if there is none."""
    spec = job.spec.model_dump(
        mode="json", exclude={"labels", "webhook", "deploy", "push"}, exclude_none=True
    )
    for section in ("calibration", "evaluation"):
        spec.get(section, {}).pop("texts", None)  # as long as a book; the digest in the report names them
    recipes = spec.pop("recipe")
    if isinstance(recipes, list) and len(recipes) == 1:
        recipes = recipes[0]
    params = {name: text(value) for name, value in flat({**spec, "recipe": recipes})}
    tags = {
        "nibble.job": job.id,
        "nibble.state": job.state.value,
        **({"nibble.error": job.error.code} if job.error is not None else {}),
        **{f"label.{key}": value for key, value in job.spec.labels.items()},
    }
    return FlatJob(
        params=fitted(params),
        metrics=fitted(dict(metrics(report or {}))),
        tags=fitted(tags),
        artifacts={art_id: f"/v1/artifacts/{art_id}" for art_id in job.artifacts},
    )


def metrics(report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    candidates = report.get("candidates", [])
    entries: dict[str, Any] = {
        "original": report.get("original", {}),
        "stage_seconds": report.get("stages", {}),
        "peak_rss_bytes": report.get("peak_rss_bytes"),
        "peak_vram_bytes": report.get("peak_vram_bytes"),
    }
    for candidate in candidates:
        own = {
            name: value for name, value in candidate.items() if name not in ("layers", "linears", "recipe")
        }
        prefix = f"{candidate.get('recipe_index', 0)}." if len(candidates) > 1 else ""
        entries |= {f"{prefix}{name}": value for name, value in own.items()}
    for name, value in flat(entries):
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield name, float(value)


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a document under their paths, joined by dots."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value):
        for index, inner in enumerate(value):
            yield from flat(inner, f"{name}.{index}")
    elif value is not None:
        yield name, value


def text(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value))[:LONGEST_VALUE]


def fitted(values: Mapping[str, Any]) -> dict[str, Any]:
    return {OTHER.sub("_", name)[:LONGEST_NAME]: value for name, value in values.items()}
