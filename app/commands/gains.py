"""What a job has won, in a few lines: size, perplexity with its uncertainty, KL, top token, speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from app.commands.terminal import human_bytes
from app.core.records.job import NEAR

Figures = Mapping[str, Any]
# From a candidate's label to tokens per second of the original and of the candidate; None where not served.
SpeedOf = Callable[[str], tuple[float | None, float | None]]
NAMES = 12  # columns of a figure's name


def best_candidate(report: Figures) -> Figures | None:
    """Of the published candidates the smallest near the original, else the one with the least KL.

    None if there is none; of a report that publishes nothing all candidates count.
    """
    candidates: list[Figures] = list(report.get("candidates", []))
    published = report.get("published") or []
    candidates = [each for each in candidates if each.get("recipe_index") in published] or candidates
    near = [each for each in candidates if (each.get("perplexity_ratio") or NEAR + 1) <= NEAR]
    if near:
        return min(near, key=lambda each: (smallest(each.get("bytes")) or 0, nearness(each)))
    return min(candidates, key=nearness, default=None)


def nearness(figures: Figures) -> float:
    """KL to the original; infinite where nothing was measured."""
    kl = figures.get("kl")
    return float(kl) if kl is not None else float("inf")


def show_outcome(console: Console, report: Figures, speed: SpeedOf | None = None) -> None:
    """Print what was won, or nothing for a job without a result; `speed` says how fast it is served."""
    candidate = best_candidate(report)
    if candidate is None or report.get("complete") is False:
        return
    before, after = (None, None) if speed is None else speed(str(candidate.get("label")))
    lines = outcome_lines(
        {"tokens_per_s": before, **report.get("original", {})}, {"tokens_per_s": after, **candidate}
    )
    if not lines:
        return
    console.print()
    console.print(f"[bold]{escape(str(candidate.get('label', 'result')))}[/] against the original")
    for name, text in lines:
        console.print(f"  {name:<{NAMES}}{escape(text)}")


def outcome_lines(original: Figures, candidate: Figures) -> list[tuple[str, str]]:
    """Name and text of each figure that was measured."""
    lines = [
        ("size", size_change(original.get("bytes"), smallest(candidate.get("bytes")))),
        ("perplexity", perplexity_change(original.get("perplexity"), candidate)),
        ("uncertain", uncertainty(candidate)),
        ("KL", f"{candidate['kl']:.4f} nats per token" if candidate.get("kl") is not None else ""),
        ("top token", same_top_token(candidate)),
        ("tasks", recovered(candidate)),
        ("speed", speed_change(original.get("tokens_per_s"), candidate.get("tokens_per_s"))),
    ]
    return [(name, text) for name, text in lines if text]


def smallest(sizes: Mapping[str, float] | float | None) -> float | None:
    if isinstance(sizes, Mapping):
        return min(sizes.values(), default=None)
    return sizes


def size_change(before: float | None, after: float | None) -> str:
    """`11.5 MB → 4.6 MB (2.5× smaller)`."""
    if not before or not after:
        return ""
    ratio = before / after
    words = f"{ratio:.1f}× smaller" if ratio >= 1 else f"{1 / ratio:.1f}× larger"
    return f"{human_bytes(before)} → {human_bytes(after)} ({words})"


def perplexity_change(before: float | None, candidate: Figures) -> str:
    """`12.31 → 12.40, +0.70 %`; a change that may be chance is called so."""
    after, ratio = candidate.get("perplexity"), candidate.get("perplexity_ratio")
    if after is None or ratio is None:
        return ""
    values = f"{before:.2f} → {after:.2f}" if before is not None else f"{after:.2f}"
    if candidate.get("perplexity_ratio_interval") is None:
        return f"{values}, {percent(ratio)}"
    return f"{values}, {percent(ratio)}{'' if is_beyond_noise(candidate) else ': within the noise'}"


def uncertainty(candidate: Figures) -> str:
    """The interval that the change of the perplexity lies in."""
    interval = candidate.get("perplexity_ratio_interval")
    if interval is None:
        return "" if candidate.get("perplexity_ratio") is None else "the perplexity's interval is unknown"
    return f"95 % interval {percent(interval['low']).removesuffix(' %')} to {percent(interval['high'])}"


def is_beyond_noise(candidate: Figures) -> bool:
    """Whether the evaluation text tells the model from the original."""
    interval = candidate.get("perplexity_ratio_interval")
    if interval is None:
        return False
    return bool(candidate.get("beyond_noise", not interval["low"] <= 1 <= interval["high"]))


def percent(ratio: float) -> str:
    """`+0.70 %` of 1.007."""
    return f"{0.0 + round(100 * (ratio - 1), 2):+.2f} %"


def same_top_token(candidate: Figures) -> str:
    share = candidate.get("top1_agreement")
    return "" if share is None else f"same as the original's for {share:.1%} of tokens"


def recovered(candidate: Figures) -> str:
    share = (candidate.get("tasks") or {}).get("recovery")
    return "" if share is None else f"{share:.1%} of the original's scores"


def speed_change(before: float | None, after: float | None) -> str:
    """`21.3 → 34.0 tokens per second (1.6×)`."""
    if not after:
        return ""
    if not before:
        return f"{after:.1f} tokens per second"
    return f"{before:.1f} → {after:.1f} tokens per second ({after / before:.1f}×)"
