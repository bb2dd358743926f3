"""How fast a job's result is served: tokens per second of one answer, as its servers measure it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from app.core.errors import NibbleError

if TYPE_CHECKING:
    from app.client import NibbleClient

BETWEEN_TOKENS = "vllm:inter_token_latency_seconds"


def served_speed(client: NibbleClient, job_id: str, label: str) -> tuple[float | None, float | None]:
    """Of the original and of the candidate with this label; None where it isn't served, or nothing was asked.

    A key that may not read deployments learns nothing here: the report is there all the same.
    """
    speeds: dict[bool, float | None] = {True: None, False: None}  # by whether the original is served
    with contextlib.suppress(NibbleError):
        artifacts = client.job(job_id).artifacts
        for deployment in client.deployments(limit=100).items:
            slot = next((each.slot for each in deployment.servers if each.state == "ready"), None)
            if deployment.artifact not in artifacts or slot is None:
                continue
            if client.artifact(deployment.artifact).summary.get("label") in (label, None):
                speeds[deployment.original] = tokens_per_s(client.server_metrics(deployment.id, slot))
    return speeds[True], speeds[False]


def tokens_per_s(metrics: str) -> float | None:
    """Of one answer: the inverse of the mean time between two tokens; None before the first answer."""
    from prometheus_client.parser import text_string_to_metric_families

    sums = {"_sum": 0.0, "_count": 0.0}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            end = sample.name.removeprefix(BETWEEN_TOKENS)
            if end in sums:
                sums[end] += sample.value
    return sums["_count"] / sums["_sum"] if sums["_sum"] > 0 else None
