"""Recovery of task scores: ratios, paired errors, intervals."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from workers.child.recovery import TaskOutcome, compared, score_of


def outcome(documents: list[float], task: str = "one", metric: str = "acc", **changes: object) -> TaskOutcome:
    mean = sum(documents) / len(documents)
    values = {
        "task": task, "metric": metric, "higher_is_better": True, "value": mean, "standard_error": 0.02,
        "count": len(documents), "documents": tuple(documents),
    }  # fmt: skip
    return TaskOutcome(**{**values, **changes})  # type: ignore[arg-type]


def test_a_score_has_the_paired_error_and_the_ratio() -> None:
    dice = random.Random(0)
    original = [float(dice.random() < 0.6) for _ in range(400)]
    own = [value if dice.random() < 0.95 else 1 - value for value in original]
    score = score_of(outcome(original), outcome(own))
    differences = torch.tensor(own) - torch.tensor(original)
    assert score.difference_standard_error == pytest.approx(float(differences.std()) / 20)
    assert score.recovery == pytest.approx(sum(own) / sum(original))
    assert score.recovery_interval is not None
    assert score.recovery_interval.low < score.recovery < score.recovery_interval.high
    assert (score.original_standard_error, score.documents) == (0.02, 400)
    # Far less than if the two had been scored on different documents: 5 % of the answers differ.
    alone = float(torch.tensor(own).std()) / 20
    assert score.difference_standard_error < alone / 1.5


def test_the_interval_of_the_ratio_is_that_of_resampled_documents() -> None:
    dice = random.Random(1)
    original = [float(dice.random() < 0.7) for _ in range(300)]
    own = [value if dice.random() < 0.9 else 1 - value for value in original]
    interval = score_of(outcome(original), outcome(own)).recovery_interval
    assert interval is not None
    ratios = []
    for _ in range(2000):
        chosen = dice.choices(range(300), k=300)
        ratios.append(sum(own[index] for index in chosen) / sum(original[index] for index in chosen))
    assert interval.standard_error == pytest.approx(float(torch.tensor(ratios).std()), rel=0.1)


def test_identical_models_recover_everything_without_noise() -> None:
    answers = [1.0, 0.0, 1.0, 1.0]
    scores = compared([outcome(answers)], [outcome(answers)])
    assert scores.recovery == 1
    assert scores.recovery_interval is not None
    assert (scores.recovery_interval.low, scores.recovery_interval.high) == (1, 1)


def test_where_less_is_better_the_ratio_is_turned_around() -> None:
    original, own = outcome([2.0, 4.0], higher_is_better=False), outcome([4.0, 4.0], higher_is_better=False)
    score = score_of(original, own)
    assert score.recovery == 0.75
    assert (score.original, score.quantized) == (3, 4)


def test_what_is_no_mean_has_no_paired_error() -> None:
    pair = [replace(outcome([1.0]), documents=(), value=value) for value in (0.5, 0.4)]
    score = score_of(*pair)
    assert score.recovery == 0.8
    assert (score.difference_standard_error, score.recovery_interval) == (None, None)


def test_the_mean_is_over_the_first_metric_of_each_task() -> None:
    names = (("one", "acc_norm"), ("one", "acc"), ("two", "acc"))
    original = [outcome([1.0, 1.0, 1.0, 1.0], task, metric) for task, metric in names]
    answers = ([1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0])
    own = [outcome(values, task, metric) for values, (task, metric) in zip(answers, names, strict=True)]
    scores = compared(original, own)
    assert scores.recovery == pytest.approx((0.75 + 0.5) / 2)
    assert [each.metric for each in scores.scores] == ["acc_norm", "acc", "acc"]
    errors = [each.recovery_interval.standard_error for each in (scores.scores[0], scores.scores[2])
              if each.recovery_interval is not None]  # fmt: skip
    assert scores.recovery_interval is not None
    assert scores.recovery_interval.standard_error == pytest.approx(math.hypot(*errors) / 2)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_an_original_that_scores_nothing_has_no_recovery(value: float) -> None:
    scores = compared([outcome([0.0, 0.0], value=value)], [outcome([1.0, 0.0])])
    assert (scores.recovery, scores.recovery_interval) == (None, None)
