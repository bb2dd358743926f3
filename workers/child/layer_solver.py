"""From a layer's statistics and a recipe to the quantized layer, checked against the original."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.core.errors import RecipeUnsupported, VerificationFailed
from app.core.jobs.report import LayerReport, LinearReport
from app.core.planning.plan import CandidatePlan, Plan
from workers.child.statistics_store import LayerStatistics
from workers.modeling.checkpoint import Checkpoint
from workers.quantization.calibration import EQUIVALENCE_LIMIT, CalibrationPass, equivalence_error
from workers.quantization.folding import Heads
from workers.quantization.layer import LayerResult, LayerTask, OwnChain, quantize_layer


@dataclass(frozen=True)
class CalibratedLayer:
    """A layer that is ready for any recipe."""

    layer: int
    weights: dict[str, Tensor]  # float32 on the device, by name in the layer
    statistics: LayerStatistics


class LayerSolver:
    """Quantizes layers of one model."""

    def __init__(self, plan: Plan, checkpoint: Checkpoint, compute_dtype: torch.dtype) -> None:
        self.plan, self.checkpoint, self.compute_dtype = plan, checkpoint, compute_dtype
        self.weight_dtype: torch.dtype = getattr(torch, plan.dtype)

    def solve(
        self,
        candidate: CandidatePlan,
        calibrated: CalibratedLayer,
        run: CalibrationPass,
        chain: OwnChain | None = None,
    ) -> tuple[LayerResult, LayerReport]:
        """The quantized layer; `chain` is the candidate's own view of it.

        Raises VerificationFailed if the scaled layer is another function than the original, RecipeUnsupported
        with the layer's number if the recipe can't be applied to its weights.
        """
        started = time.monotonic()
        try:
            result, folded = quantize_layer(replace(self.task(candidate, calibrated), chain=chain))
        except RecipeUnsupported as refusal:
            where = f"recipe {candidate.recipe_index}, layer {calibrated.layer}"
            raise RecipeUnsupported(
                f"{where}: {refusal.message}", code=refusal.code, remedy=refusal.remedy
            ) from refusal
        error = equivalence_error(run, calibrated.layer, folded, calibrated.statistics.probe)
        self.check_equivalence(candidate, calibrated.layer, error)
        report = LayerReport(
            layer=calibrated.layer,
            seconds=time.monotonic() - started,
            equivalence_error=error,
            learning=result.learning,
            linears=(
                *self.explained(candidate, calibrated.layer, result.report),
                *self.kept_linears(candidate, calibrated.layer),
            ),
        )
        return result, report

    def task(self, candidate: CandidatePlan, calibrated: CalibratedLayer) -> LayerTask:
        prefix = self.plan.architecture.layer_prefix(calibrated.layer)
        schemes = {
            linear.name.removeprefix(prefix): linear.scheme
            for linear in candidate.linears
            if linear.name.startswith(prefix) and linear.scheme is not None
        }
        return LayerTask(
            self.plan.architecture.at(calibrated.layer),
            candidate.recipe,
            schemes,
            Heads.of(self.checkpoint.config),
            calibrated.weights,
            calibrated.statistics.groups,
            self.weight_dtype,
            formats=tuple(candidate.output_bytes),
        )

    def check_equivalence(self, candidate: CandidatePlan, layer: int, error: float) -> None:
        """Scales that change the model's function must never reach a file."""
        limit = EQUIVALENCE_LIMIT[self.compute_dtype]
        if not error <= limit:
            raise VerificationFailed(
                f"recipe {candidate.recipe_index}, layer {layer}: the scaled, unrounded layer differs from "
                f"the original by {error:.2e} (limit {limit:.0e})",
                code="equivalence_failed", remedy="use method rtn, and report the model's architecture",
            )  # fmt: skip

    def explained(
        self, candidate: CandidatePlan, layer: int, entries: list[LinearReport]
    ) -> Iterator[LinearReport]:
        """The entries with what the plan changed about their linears."""
        prefix = self.plan.architecture.layer_prefix(layer)
        reasons = {linear.name: linear.reason for linear in candidate.linears if linear.reason}
        for entry in entries:
            both = [reason for reason in (reasons.get(prefix + entry.linear), entry.reason) if reason]
            yield entry.model_copy(update={"reason": "; ".join(both) or None})

    def kept_linears(self, candidate: CandidatePlan, layer: int) -> Iterator[LinearReport]:
        prefix = self.plan.architecture.layer_prefix(layer)
        for linear in candidate.linears:
            if linear.name.startswith(prefix) and linear.scheme is None:
                yield LinearReport(linear=linear.name.removeprefix(prefix), bits=None, reason=linear.reason)
