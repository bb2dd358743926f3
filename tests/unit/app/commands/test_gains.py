from __future__ import annotations

import io

from rich.console import Console

from app.commands.gains import best_candidate, outcome_lines, show_outcome

INTERVAL = {"standard_error": 0.001, "low": 0.9979, "high": 1.0121}
CANDIDATE = {
    "recipe_index": 0, "label": "awq w4 g64", "perplexity": 12.40, "perplexity_ratio": 1.007, "kl": 0.0123,
    "perplexity_ratio_interval": INTERVAL, "beyond_noise": False, "top1_agreement": 0.943,
    "bytes": {"gguf": 5_000_000, "compressed-tensors": 4_600_000},
}  # fmt: skip
ORIGINAL = {"perplexity": 12.31, "bytes": 11_500_000}


def test_a_change_within_the_interval_is_called_noise() -> None:
    assert dict(outcome_lines(ORIGINAL, CANDIDATE)) == {
        "size": "11.5 MB → 4.6 MB (2.5× smaller)",
        "perplexity": "12.31 → 12.40, +0.70 %: within the noise",
        "uncertain": "95 % interval -0.21 to +1.21 %",
        "KL": "0.0123 nats per token",
        "top token": "same as the original's for 94.3% of tokens",
    }


def test_a_change_beyond_it_is_not() -> None:
    beyond = {**CANDIDATE, "perplexity_ratio_interval": {"low": 1.002, "high": 1.012}, "beyond_noise": True}
    assert "noise" not in dict(outcome_lines(ORIGINAL, beyond))["perplexity"]
    unsaid = {name: value for name, value in beyond.items() if name != "beyond_noise"}
    assert "noise" not in dict(outcome_lines(ORIGINAL, unsaid))["perplexity"]
    unknown = {**CANDIDATE, "perplexity_ratio_interval": None}
    assert dict(outcome_lines(ORIGINAL, unknown))["uncertain"] == "the perplexity's interval is unknown"


def test_what_was_not_measured_has_no_line() -> None:
    unjudged = {"label": "rtn fp8", "perplexity": None, "kl": None, "bytes": {"awq": 4_000_000}}
    assert outcome_lines({"bytes": 8_000_000}, unjudged) == [("size", "8.0 MB → 4.0 MB (2.0× smaller)")]
    measured = {**unjudged, "tokens_per_s": 34.0}
    assert ("speed", "20.0 → 34.0 tokens per second (1.7×)") in outcome_lines(
        {"tokens_per_s": 20.0}, measured
    )


def test_of_several_the_published_one_counts_else_the_nearest() -> None:
    near = {**CANDIDATE, "recipe_index": 1, "label": "awq w8", "kl": 0.001, "bytes": {"awq": 9_000_000}}
    # As in the dashboard: the smallest of those within a percent of the original's perplexity.
    assert best_candidate({"candidates": [near, CANDIDATE]}) == CANDIDATE
    far = {**CANDIDATE, "perplexity_ratio": 1.02}
    assert best_candidate({"candidates": [far, near]}) == near
    farther = {**near, "perplexity_ratio": 1.03}
    assert best_candidate({"candidates": [far, farther]}) == farther
    assert best_candidate({"candidates": [CANDIDATE, near], "published": [1]}) == near
    assert best_candidate({"candidates": []}) is None


def shown(report: dict[str, object], width: int = 80) -> list[str]:
    out = io.StringIO()
    show_outcome(Console(file=out, width=width), report)
    return out.getvalue().splitlines()


def test_the_lines_fit_a_terminal() -> None:
    lines = shown({"original": ORIGINAL, "candidates": [CANDIDATE]})
    assert lines[:2] == ["", "awq w4 g64 against the original"]
    assert len(lines) == 7
    assert max(map(len, lines)) <= 80
    assert shown({"complete": False, "candidates": []}) == []
