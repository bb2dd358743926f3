"""Solved candidates packed, read back, and measured against the original."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from app.core.formats.registry import FormatName
from app.core.jobs.report import Interval, LayerReport, Quality
from app.core.planning.plan import CandidatePlan
from app.core.records.job import Stage
from app.core.records.specs import TargetSpec
from workers.child.candidate_files import CandidateFiles
from workers.child.ladder import AS_ASKED
from workers.child.stage_clock import StageClock
from workers.child.task_scores import task_scores
from workers.child.work import JobTexts, Work
from workers.formats.folder import FolderModel, FormatFolder
from workers.quantization.evaluation import compare, final_states


@dataclass(frozen=True)
class MeasuredOriginal:
    """The original model on the evaluation text."""

    quality: Quality
    states: list[Tensor]  # after the last layer, by batch


class Bound(NamedTuple):
    """A limit of a target, and the figure that may not pass it."""

    name: str
    limit: float | None
    figure: float | None
    interval: Interval | None
    is_least: bool = False  # else the limit is the most

    @property
    def holds(self) -> bool:
        if self.limit is None or self.figure is None:
            return False
        return self.figure >= self.limit if self.is_least else self.figure <= self.limit

    def doubt(self) -> str | None:
        """What the interval leaves open; None if it is clear of the limit."""
        if self.limit is None or self.interval is None or not self.interval.holds(self.limit):
            return None
        beyond = self.holds is not self.is_least
        edge = f"reaches {self.interval.high:.5f}" if beyond else f"begins at {self.interval.low:.5f}"
        return f"the 95 % interval of the {self.name} {edge}"


@dataclass(frozen=True)
class JudgedCandidate:
    """A candidate that was packed, read back and measured."""

    candidate: CandidatePlan
    quality: Quality
    folders: tuple[FormatFolder, ...]
    bytes: dict[FormatName, int]
    layers: list[LayerReport]
    rung: str = AS_ASKED  # of the ladder to the target
    reason: str = "the job's recipe"  # why it was tried

    @property
    def perplexity_ratio(self) -> float:
        return self.quality.perplexity_ratio

    @property
    def recovery(self) -> float | None:
        """Of the original's task scores; None without tasks, or where the original scores nothing."""
        return None if self.quality.tasks is None else self.quality.tasks.recovery

    def excess(self, target: TargetSpec) -> float:
        """How far it misses the target; at most 1 where it meets it."""
        return target.excess(self.perplexity_ratio, self.quality.kl, self.recovery, self.size)

    @property
    def size(self) -> int:
        """Bytes of the files in the format where they are largest."""
        return max(self.bytes.values(), default=0)

    def rank(self, target: TargetSpec) -> tuple[float, float]:
        """Smaller is better: how far it misses the target; within bytes alone, its error."""
        excess = self.excess(target)
        if target.limits_quality:
            return excess, 0.0
        return max(1.0, excess), math.inf if math.isnan(self.quality.kl) else self.quality.kl

    def verdict(self, target: TargetSpec) -> str:
        """Whether it meets the target, and what the noise of the evaluation text leaves open."""
        met, doubt = "met" if self.excess(target) <= 1 else "missed", self.doubt(target)
        return met if doubt is None else f"{met}, but {doubt}"

    def doubt(self, target: TargetSpec) -> str | None:
        """Why other text of the kind might lead to another verdict; None where the intervals rule it out."""
        met = self.excess(target) <= 1
        doubts = [bound.doubt() for bound in self.bounds(target) if bound.holds == met]
        if not met and None in doubts:
            return None  # a limit that is certainly missed decides
        return " and ".join(filter(None, doubts)) or None

    def bounds(self, target: TargetSpec) -> list[Bound]:
        """The limits of a target beside what they bound."""
        quality = self.quality
        ratio_interval = quality.perplexity_ratio_interval
        recovery_interval = None if quality.tasks is None else quality.tasks.recovery_interval
        bounds = (
            Bound("perplexity ratio", target.max_perplexity_ratio, quality.perplexity_ratio, ratio_interval),
            Bound("KL", target.max_kl, quality.kl, quality.kl_interval),
            Bound("recovery", target.min_recovery, self.recovery, recovery_interval, is_least=True),
        )
        return [bound for bound in bounds if bound.limit is not None]

    @property
    def figures_text(self) -> str:
        """What a target looks at, in words."""
        ratio = f"{self.perplexity_ratio:.4f} times the original's perplexity"
        recovery = "" if self.recovery is None else f" and {self.recovery:.4f} of its task scores"
        return f"{ratio} and a KL of {self.quality.kl:.4f}{recovery}"

    @property
    def figures(self) -> dict[str, Any]:
        """The summary of an artifact."""
        return {
            "label": self.candidate.label,
            **self.quality.model_dump(exclude_none=True),
            "bits_per_weight": self.candidate.bits_per_weight,
        }


def judge(
    work: Work,
    texts: JobTexts,
    files: Sequence[CandidateFiles],
    clock: StageClock,
    original: MeasuredOriginal | None = None,
) -> tuple[MeasuredOriginal, list[JudgedCandidate]]:
    """The original, measured along with the candidates unless it was before, and the candidates.

    Raises VerificationFailed for files that differ from what was computed.
    """
    for number, one in enumerate(files, start=1):
        pack(one, clock)
        clock.progress(0.6 + 0.1 * number / len(files), work.plan.steps)
    single = None if original is None else files[0].candidate.recipe_index
    with clock.stage(Stage.EVALUATING, single):
        original, qualities = measure(work, texts, files, clock, original)
    judged = [
        JudgedCandidate(
            candidate=one.candidate,
            quality=quality,
            folders=one.folders,
            bytes={folder.name: folder.weight_bytes for folder in one.folders},
            layers=one.layer_reports(),
        )
        for one, quality in zip(files, qualities, strict=True)
    ]
    return original, judged


def pack(files: CandidateFiles, clock: StageClock) -> None:
    """Write the candidate in every format, and compare what is read back."""
    index, shard_bytes = files.candidate.recipe_index, files.work.assignment.shard_bytes
    for folder in files.folders:
        with clock.stage(Stage.PACKING, index):
            folder.write(files.load_layer, shard_bytes)
        with clock.stage(Stage.VERIFYING, index):
            folder.verify(files.load_layer)


def measure(
    work: Work,
    texts: JobTexts,
    files: Sequence[CandidateFiles],
    clock: StageClock,
    original: MeasuredOriginal | None,
) -> tuple[MeasuredOriginal, list[Quality]]:
    """The original and every candidate, the latter as its first format's files say it is."""
    decoder, batches, steps = work.decoder(), work.batches(texts.evaluation), work.plan.steps
    pinned = work.device.type == "cuda"
    share = 0.29 if texts.tasks is None else 0.14  # of the progress
    folders = [one.folders[0] for one in files]
    models = [FolderModel.of(folder) for folder in folders]
    originals = [partial(decoder.layer_weights, pinned=pinned)] if original is None else []
    states = final_states(
        decoder,
        batches,
        [*originals, *models],
        lambda layer: clock.progress(0.7 + share * (layer + 1) / decoder.num_layers, steps),
    )
    if original is not None:
        states = [original.states, *states]
    quality, *qualities = compare(decoder, batches, states, models)
    if texts.tasks is not None:
        scores = task_scores(work, texts.tasks, models, clock)
        qualities = [
            each.model_copy(update={"tasks": own}) for each, own in zip(qualities, scores, strict=True)
        ]
    return MeasuredOriginal(quality, states[0]), qualities
