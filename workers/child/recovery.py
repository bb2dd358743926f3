"""How much of the original's task scores a quantized model recovers, and how sure that is.

Both models answer the same documents, so they are compared document by document: what makes one hard is in
both and cancels. The recovery of a mean is a ratio of means; its interval is that of the linearized ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from app.core.jobs.report import Interval, TaskScore, TaskScores
from workers.quantization.evaluation import interval


@dataclass(frozen=True)
class TaskOutcome:
    """One metric of a task for one model."""

    task: str
    metric: str
    higher_is_better: bool
    value: float
    standard_error: float | None  # lm-eval's; None where it has none
    count: int  # documents
    documents: tuple[float, ...]  # whose mean is the value; empty where it is no mean


def compared(original: Sequence[TaskOutcome], own: Sequence[TaskOutcome]) -> TaskScores:
    """Both models' metrics side by side. A task counts by the metric that it names first."""
    scores = tuple(score_of(*pair) for pair in zip(original, own, strict=True))
    first = {score.task: score for score in reversed(scores)}.values()
    recoveries = [score.recovery for score in first if score.recovery is not None]
    complete = len(recoveries) == len(first)
    recovery = sum(recoveries) / len(first) if complete else None
    return TaskScores(
        recovery=recovery,
        recovery_interval=interval_of_mean(recovery, [score.recovery_interval for score in first]),
        scores=scores,
    )


def score_of(original: TaskOutcome, own: TaskOutcome) -> TaskScore:
    upper, lower = (own, original) if own.higher_is_better else (original, own)
    pairs = list(zip(upper.documents, lower.documents, strict=bool(upper.documents and lower.documents)))
    difference = interval_of([above - below for above, below in pairs])
    recovery = upper.value / lower.value if lower.value > 0 else math.nan
    return TaskScore(
        task=own.task,
        metric=own.metric,
        documents=own.count,
        original=finite(original.value),
        original_standard_error=finite(original.standard_error),
        quantized=finite(own.value),
        quantized_standard_error=finite(own.standard_error),
        difference_standard_error=None if difference is None else difference.standard_error,
        recovery=finite(recovery),
        recovery_interval=interval_of(
            [recovery + (above - recovery * below) / lower.value for above, below in pairs]
        )
        if math.isfinite(recovery)
        else None,
    )


def interval_of(values: list[float]) -> Interval | None:
    """The 95 % interval of the mean of independent values; None for fewer than two."""
    return interval(torch.tensor(values, dtype=torch.float64)[:, None]) if len(values) > 1 else None


def interval_of_mean(mean: float | None, intervals: Sequence[Interval | None]) -> Interval | None:
    """Of the mean of figures on different documents; None where one has no interval."""
    if mean is None or any(each is None for each in intervals):
        return None
    count = len(intervals)
    reach = math.hypot(*((each.high - each.low) / 2 for each in intervals if each is not None)) / count
    error = math.hypot(*(each.standard_error for each in intervals if each is not None)) / count
    return Interval(standard_error=error, low=mean - reach, high=mean + reach)


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
