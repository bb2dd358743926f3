"""From a layer's statistics and a recipe to the quantized layer, checked against the original."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

from app.core.errors import RecipeUnsupported, VerificationFailed
from app.core.jobs.report import CacheScales, ExpertTokens, LayerReport, LinearReport
from app.core.planning.architectures import Architecture
from app.core.planning.cached_attention import ATTENTION, CACHE_SCALES
from app.core.planning.plan import CandidatePlan, Plan
from app.core.records.job import Stage
from workers.child.candidate_files import CandidateFiles
from workers.child.layer_files import StoredLinears
from workers.child.layer_writer import LayerWriter
from workers.child.quantized_chains import QuantizedChains
from workers.child.stage_clock import StageClock
from workers.child.work import Work
from workers.modeling.layer_weights import Weights
from workers.quantization.calibration import EQUIVALENCE_LIMIT, CalibrationPass, equivalence_error
from workers.quantization.folding import Heads
from workers.quantization.input_statistics import EXPERT_TOKENS, LayerStatistics
from workers.quantization.layer import LayerResult, LayerTask, OwnChain, quantize_layer


@dataclass(frozen=True)
class CalibratedLayer:
    """A layer that is ready for any recipe."""

    layer: int
    weights: Weights  # float32 on the device, by name in the layer
    statistics: LayerStatistics


@dataclass(frozen=True)
class LayerSolver:
    """Quantizes one layer after the other, each for one recipe at a time."""

    work: Work
    run: CalibrationPass  # of any number of batches: what layers are called with
    chains: QuantizedChains
    writer: LayerWriter
    clock: StageClock

    def solve(self, files: CandidateFiles, calibrated: CalibratedLayer) -> None:
        """One layer for one recipe, kept as a checkpoint; the recipe's own chain goes on behind it.

        Raises VerificationFailed if the scaled layer is another function than the original, RecipeUnsupported
        with the layer's number if the recipe can't be applied to its weights.
        """
        candidate = files.candidate
        with self.clock.stage(Stage.SEARCHING, candidate.recipe_index):
            chain = self.chains.view(candidate, calibrated.weights)
            result, report = self.quantized(files, calibrated, chain)
            self.writer.put(partial(files.keep_layer, result, report))
            self.chains.advance(candidate, calibrated.weights, result)

    def quantized(
        self, files: CandidateFiles, calibrated: CalibratedLayer, chain: OwnChain | None
    ) -> tuple[LayerResult, LayerReport]:
        """The layer and its report; `chain` is the candidate's own view of it."""
        started, layer, candidate = time.monotonic(), calibrated.layer, files.candidate
        linears = files.new_linears(layer)
        try:
            task = layer_task(self.work, candidate, calibrated, chain)
            result, folded = quantize_layer(replace(task, quantized=linears))
        except RecipeUnsupported as refusal:
            where = f"recipe {candidate.recipe_index}, layer {layer}"
            raise RecipeUnsupported(
                f"{where}: {refusal.message}", code=refusal.code, remedy=refusal.remedy
            ) from refusal
        if isinstance(linears, StoredLinears):
            linears.file.flush()
        error = 0.0  # nothing is folded before the head
        if not self.work.plan.architecture.is_head(layer):
            error = equivalence_error(self.run, layer, folded, calibrated.statistics.probe)
        limit = EQUIVALENCE_LIMIT[self.work.compute_dtype]
        if not error <= limit:  # scales that change the model's function must never reach a file
            raise VerificationFailed(
                f"recipe {candidate.recipe_index}, layer {layer}: the scaled, unrounded layer differs from "
                f"the original by {error:.2e} (limit {limit:.0e})",
                code="equivalence_failed", remedy="use method rtn, and report the model's architecture",
            )  # fmt: skip
        report = LayerReport(
            layer=layer,
            seconds=time.monotonic() - started,
            equivalence_error=error,
            experts=expert_tokens(calibrated.statistics, self.work.plan.architecture.at(layer)),
            learning=result.learning,
            cache_scales=scales_report(result),
            linears=(
                *planned_reasons(self.work.plan, candidate, layer, result.report),
                *unquantized_linears(self.work.plan, candidate, layer),
            ),
        )
        return result, report


def scales_report(result: LayerResult) -> CacheScales | None:
    """Of the cache of a layer; None where it gets none."""
    scales = [result.dense.get(f"{ATTENTION}.{name}") for name in CACHE_SCALES]
    key, value = (None if scale is None else float(scale) for scale in scales)
    return None if key is None or value is None else CacheScales(key=key, value=value)


def expert_tokens(statistics: LayerStatistics, architecture: Architecture) -> ExpertTokens | None:
    """How many tokens each of a layer's experts saw; None without experts."""
    if architecture.experts is None:
        return None
    by_expert = {
        group.expert: (seen.routed_tokens or 0, seen.all_shown)
        for group, seen in zip(architecture.groups, statistics.groups, strict=True)
        if group.expert is not None
    }
    counts = [count for count, _ in by_expert.values()]
    if not counts:
        return None
    return ExpertTokens(
        experts=len(counts),
        least=min(counts),
        median=median(counts),
        few=sum(count < EXPERT_TOKENS for count in counts),
        needed=EXPERT_TOKENS,
        all_shown=all(shown for _, shown in by_expert.values()),
    )


def layer_task(
    work: Work, candidate: CandidatePlan, calibrated: CalibratedLayer, chain: OwnChain | None
) -> LayerTask:
    linears = candidate.of_layer(work.plan.architecture, calibrated.layer)
    schemes = {name: linear.scheme for name, linear in linears.items() if linear.scheme is not None}
    return LayerTask(
        work.plan.architecture.at(calibrated.layer),
        candidate.recipe,
        schemes,
        Heads.of(work.checkpoint.config),
        calibrated.weights,
        calibrated.statistics.groups,
        work.weight_dtype,
        chain,
        formats=tuple(candidate.output_bytes),
        cache=calibrated.statistics.cache,
    )


def planned_reasons(
    plan: Plan, candidate: CandidatePlan, layer: int, entries: list[LinearReport]
) -> Iterator[LinearReport]:
    """The entries, with the plan's changes to their linears as reasons."""
    linears = candidate.of_layer(plan.architecture, layer)
    for entry in entries:
        both = [reason for reason in (linears[entry.linear].reason, entry.reason) if reason]
        yield entry.model_copy(update={"reason": "; ".join(both) or None})


def unquantized_linears(plan: Plan, candidate: CandidatePlan, layer: int) -> Iterator[LinearReport]:
    """Entries of the linears that stay in the model's precision."""
    for name, linear in candidate.of_layer(plan.architecture, layer).items():
        if linear.scheme is None:
            yield LinearReport(linear=name, bits=None, reason=linear.reason)
