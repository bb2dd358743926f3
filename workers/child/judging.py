"""Solved candidates packed, read back, and measured against the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from app.core.formats.registry import FormatName
from app.core.jobs.report import LayerReport, Quality
from app.core.planning.plan import CandidatePlan
from app.core.records.job import Stage
from app.core.records.specs import TargetSpec
from workers.child.candidate_files import CandidateFiles
from workers.child.ladder import AS_ASKED
from workers.child.stage_clock import StageClock
from workers.child.work import Work
from workers.formats.folder import FormatFolder
from workers.modeling.checkpoint import Checkpoint
from workers.quantization.evaluation import compare, final_states
from workers.texts.windows import Windows


@dataclass(frozen=True)
class MeasuredOriginal:
    """The original model on the evaluation text."""

    quality: Quality
    states: list[Tensor]  # after the last layer, by batch


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

    def excess(self, target: TargetSpec) -> float:
        """How far it misses the target; at most 1 where it meets it."""
        return target.excess(self.perplexity_ratio, self.quality.kl)

    def verdict(self, target: TargetSpec) -> str:
        """Whether it meets the target, and what the noise of the evaluation text leaves open."""
        met, doubt = "met" if self.excess(target) <= 1 else "missed", self.doubt(target)
        return met if doubt is None else f"{met}, but {doubt}"

    def doubt(self, target: TargetSpec) -> str | None:
        """Why other text of the kind might lead to another verdict; None where the intervals rule it out."""
        quality, met = self.quality, self.excess(target) <= 1
        doubts = []
        for name, limit, figure, interval in (
            ("perplexity ratio", target.max_perplexity_ratio, quality.perplexity_ratio,
             quality.perplexity_ratio_interval),
            ("KL", target.max_kl, quality.kl, quality.kl_interval),
        ):  # fmt: skip
            if limit is None or (figure <= limit) != met:
                continue
            if interval is not None and interval.low <= limit <= interval.high:
                bound = f"reaches {interval.high:.5f}" if met else f"begins at {interval.low:.5f}"
                doubts.append(f"the 95 % interval of the {name} {bound}")
            elif not met:
                return None  # a limit that is certainly missed decides
        return " and ".join(doubts) or None

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
    evaluation: Windows,
    files: Sequence[CandidateFiles],
    clock: StageClock,
    original: MeasuredOriginal | None = None,
) -> tuple[MeasuredOriginal, list[JudgedCandidate]]:
    """The original, measured along with the candidates unless it was before, and the candidates.

    Raises VerificationFailed for files that differ from what was computed.
    """
    for number, one in enumerate(files, start=1):
        pack(one, clock)
        clock.progress(0.6 + 0.1 * number / len(files), work.plan.num_layers)
    single = None if original is None else files[0].candidate.recipe_index
    with clock.stage(Stage.EVALUATING, single):
        original, qualities = measure(work, evaluation, files, clock, original)
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
    evaluation: Windows,
    files: Sequence[CandidateFiles],
    clock: StageClock,
    original: MeasuredOriginal | None,
) -> tuple[MeasuredOriginal, list[Quality]]:
    """The original and every candidate, the latter as its first format's files say it is."""
    decoder, batches, num_layers = work.decoder(), work.batches(evaluation), work.plan.num_layers
    pinned = work.device.type == "cuda"
    folders = [one.folders[0] for one in files]
    models = [partial(folder.read_weights, Checkpoint(folder.folder)) for folder in folders]
    originals = [partial(decoder.layer_weights, pinned=pinned)] if original is None else []
    states = final_states(
        decoder,
        batches,
        [*originals, *models],
        lambda layer: clock.progress(0.7 + 0.29 * (layer + 1) / num_layers, num_layers),
    )
    if original is not None:
        states = [original.states, *states]
    quality, *qualities = compare(decoder, batches, states)
    return MeasuredOriginal(quality, states[0]), qualities
