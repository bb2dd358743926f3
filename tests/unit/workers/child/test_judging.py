"""A target's verdict in words: met or missed by the figures, with what the intervals leave open."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import pytest

from app.core.jobs.report import Interval, Quality, TaskScores
from app.core.records.specs import TargetSpec
from workers.child.judging import JudgedCandidate

if TYPE_CHECKING:
    from app.core.planning.plan import CandidatePlan

SHARE = "the 95 % interval of the recovery"
RATIO, KL = "the 95 % interval of the perplexity ratio", "the 95 % interval of the KL"


def judged(ratio: float, kl: float, *, reach: float = 0.0, recovery: float | None = None) -> JudgedCandidate:
    """With intervals that go `reach` of the figure to both sides; none for 0."""

    def around(figure: float) -> Interval | None:
        low, high = figure * (1 - reach), figure * (1 + reach)
        return Interval(standard_error=reach * figure / 2, low=low, high=high) if reach else None

    quality = Quality(
        perplexity=20 * ratio, perplexity_ratio=ratio, perplexity_ratio_interval=around(ratio),
        kl=kl, kl_interval=around(kl),
        tasks=None
        if recovery is None
        else TaskScores(recovery=recovery, recovery_interval=around(recovery), scores=()),
    )  # fmt: skip
    return JudgedCandidate(cast("CandidatePlan", None), quality, (), {}, [])


@pytest.mark.parametrize(
    ("target", "candidate", "verdict"),
    [
        ({"max_perplexity_ratio": 1.01}, judged(1.005, 9, reach=0.001), "met"),
        ({"max_perplexity_ratio": 1.01}, judged(1.005, 9, reach=0.008), f"met, but {RATIO} reaches 1.01304"),
        ({"max_perplexity_ratio": 1.01}, judged(1.05, 9, reach=0.001), "missed"),
        (
            {"max_perplexity_ratio": 1.01}, judged(1.015, 9, reach=0.01),
            f"missed, but {RATIO} begins at 1.00485",
        ),
        ({"max_kl": 0.02}, judged(9, 0.019, reach=0.1), f"met, but {KL} reaches 0.02090"),
        ({"max_kl": 0.02}, judged(9, 0.021, reach=0.1), f"missed, but {KL} begins at 0.01890"),
        (
            {"max_perplexity_ratio": 1.01, "max_kl": 0.02}, judged(1.0, 0.0195, reach=0.05),
            f"met, but {RATIO} reaches 1.05000 and {KL} reaches 0.02048",
        ),
        ({"max_perplexity_ratio": 1.01, "max_kl": 0.02}, judged(1.015, 0.2, reach=0.01), "missed"),
        (
            {"max_perplexity_ratio": 1.01, "max_kl": 0.2}, judged(1.015, 0.19, reach=0.1),
            f"missed, but {RATIO} begins at 0.91350",
        ),
        ({"max_perplexity_ratio": 1.01}, judged(1.005, 9), "met"),  # one window: nothing is known of noise
        ({"max_perplexity_ratio": 1.01}, judged(1.015, 9), "missed"),
        ({"max_kl": 0.02}, judged(math.nan, math.nan), "missed"),
        ({"min_recovery": 0.99}, judged(9, 9, reach=0.001, recovery=0.995), "met"),
        (
            {"min_recovery": 0.99}, judged(9, 9, reach=0.01, recovery=0.995),
            f"met, but {SHARE} begins at 0.98505",
        ),
        (
            {"min_recovery": 0.99}, judged(9, 9, reach=0.01, recovery=0.985),
            f"missed, but {SHARE} reaches 0.99485",
        ),
        ({"min_recovery": 0.99}, judged(9, 9, reach=0.001, recovery=0.9), "missed"),
        ({"min_recovery": 0.99}, judged(9, 9), "missed"),  # the original scores nothing
        ({"min_recovery": 0.9, "max_kl": 0.1}, judged(9, 0.2, reach=0.1, recovery=0.95), "missed"),
    ],
)  # fmt: skip
def test_verdicts(target: dict[str, float], candidate: JudgedCandidate, verdict: str) -> None:
    spec = TargetSpec.model_validate(target)
    assert candidate.verdict(spec) == verdict
    assert verdict.startswith("met") == (candidate.excess(spec) <= 1)
    assert (candidate.doubt(spec) is not None) == (", but " in verdict)
