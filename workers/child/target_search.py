"""Climbs the ladder until a candidate meets the job's target, or the ladder ends."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace

from app.core.errors import RecipeUnsupported
from app.core.planning.architectures import Architecture
from app.core.planning.size_target import file_bytes
from app.core.records.job import Stage
from app.core.records.specs import Recipe, TargetSpec
from workers.child.candidate_files import CandidateFiles
from workers.child.judging import JudgedCandidate, MeasuredOriginal, judge
from workers.child.ladder import Step, Try, next_step
from workers.child.layer_files import StatisticsStore
from workers.child.layer_solver import CalibratedLayer, LayerSolver
from workers.child.layer_writer import LayerWriter
from workers.child.quantized_chains import QuantizedChains
from workers.child.ranks import SharedLayers, start_pass, started
from workers.child.stage_clock import StageClock
from workers.child.work import JobTexts, Work
from workers.modeling.decoder import Decoder
from workers.quantization.calibration import CalibrationPass


@dataclass(frozen=True)
class TargetSearch:
    """Solves and judges further recipes of a job, from the statistics of its layers."""

    work: Work
    texts: JobTexts
    original: MeasuredOriginal
    statistics: StatisticsStore
    clock: StageClock

    def run(self, target: TargetSpec, asked: Sequence[JudgedCandidate]) -> list[JudgedCandidate]:
        """Every candidate in the order in which it was tried, first those that were asked for.

        Without a limit to quality the whole ladder is climbed, as far as the bytes go.
        Of those that miss the target all but the best lose their output folders.
        """
        tries = list(asked)
        while not target.limits_quality or all(judged.excess(target) > 1 for judged in tries):
            remove_losers(target, tries)
            step = next_step(
                [rated(judged, self.work.plan.architecture) for judged in tries],
                self.work.plan.architecture,
                self.refusal,
                target,
            )
            for reason in step.passed:
                self.clock.note("rung_passed", reason)
            if step.recipe is None:
                self.clock.note("ladder_ended", "no rung of the ladder is left")
                break
            tries.append(self.attempt(step, step.recipe, tries))
        return tries

    def refusal(self, recipe: Recipe) -> str | None:
        """Why the model or a format can't hold the recipe, or a target of bytes its files; or None."""
        try:
            candidate = self.work.candidate(recipe, 0)
        except RecipeUnsupported as fault:
            return fault.message
        target, size = self.work.spec.target, file_bytes(candidate)
        if target is None or target.max_size is None or size <= target.max_size:
            return None
        return f"files of {size} bytes exceed target.max_size"

    def attempt(self, step: Step, recipe: Recipe, tries: Sequence[JudgedCandidate]) -> JudgedCandidate:
        """Solve, pack and judge one more recipe."""
        base, index = tries[step.base], len(tries)
        reason = f"recipe {step.base} has {base.figures_text}"
        self.clock.note("ladder", f"{reason}; trying {step.rung} as recipe {index}")
        self.clock.next_span()
        candidate = self.work.candidate(recipe, index)
        files = CandidateFiles.of(self.work, candidate, self.work.checkpoints(self.clock, [recipe]))
        self.solve_layers(files)
        _, (judged,) = judge(self.work, self.texts, [files], self.clock, self.original)
        return replace(judged, rung=step.rung, reason=reason)

    def solve_layers(self, files: CandidateFiles) -> None:
        """The candidate's layers from the first one that is missing: a chain goes through all after it."""
        work, calibration, steps = self.work, self.texts.calibration, self.work.plan.steps
        first = next((layer for layer in range(steps) if not files.is_done(layer)), steps)
        if first == steps:
            return
        self.restore_statistics()
        decoder = work.decoder()
        window = CalibrationPass(decoder, [calibration.tokens[:1]])  # for the equivalence check
        shared = SharedLayers.of(range(first, steps), [files.candidate], calibrates=False)
        with started(work, calibration, shared, self.clock) as ranks, LayerWriter(work.device) as writer:
            chains = QuantizedChains(
                shared.candidates, decoder, work.batches(calibration), ranks, self.clock
            )  # fmt: skip
            chains.catch_up(first, files.checkpoints)
            solver = LayerSolver(work, window, chains, writer, self.clock)
            for layer in shared.layers:
                solver.solve(files, self.calibrated(decoder, layer))
                self.clock.progress(0.6 * (layer + 1) / steps, layer + 1)
            with self.clock.counted(Stage.PACKING, files.candidate.recipe_index):
                writer.finish()

    def calibrated(self, decoder: Decoder, layer: int) -> CalibratedLayer:
        weights = self.work.full_precision(decoder.layer_weights(layer))
        return CalibratedLayer(layer, weights, self.statistics.load(layer).to(self.work.device))

    def restore_statistics(self) -> None:
        """Another calibration pass over what an earlier attempt took with it."""
        work, calibration = self.work, self.texts.calibration
        missing = self.statistics.missing(work.plan.steps)
        if not missing:
            return
        self.clock.note(
            "statistics_lost",
            f"statistics of {len(missing)} layers are gone; another calibration pass makes them anew",
        )
        shared = SharedLayers.of(range(missing[0], missing[-1] + 1))
        with (
            started(work, calibration, shared, self.clock) as ranks,
            self.clock.stage(Stage.CALIBRATING),
        ):
            run = start_pass(work, calibration, work.checkpoints(self.clock), missing[0], ranks)
            for layer in shared.layers:
                self.statistics.save(layer, run.collect(run.decoder.layer_weights(layer)))


def remove_losers(target: TargetSpec, tries: Sequence[JudgedCandidate]) -> None:
    """Only the best try so far can still be published: the disk should not hold all of them."""
    best = min(tries, key=lambda judged: judged.rank(target))
    for judged in tries:
        if judged is not best:
            for folder in judged.folders:
                shutil.rmtree(folder.folder, ignore_errors=True)


def rated(judged: JudgedCandidate, architecture: Architecture) -> Try:
    """The candidate as the ladder looks at it: errors are losses as shares of outputs' mean squares."""
    return Try(
        rung=judged.rung,
        candidate=judged.candidate,
        kl=math.inf if math.isnan(judged.quality.kl) else judged.quality.kl,
        errors={
            architecture.layer_prefix(layer.layer) + linear.linear: linear.loss / linear.energy
            for layer in judged.layers
            for linear in layer.linears
            if linear.loss is not None and linear.energy
        },
    )
