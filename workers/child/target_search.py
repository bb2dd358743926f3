"""Climbs the ladder until a candidate meets the job's target, or the ladder ends."""

from __future__ import annotations

import math
import shutil

import torch

from app.core.child.assignment import CHECKPOINTS
from app.core.errors import RecipeUnsupported
from app.core.jobs.report import TryReport
from app.core.planning.plan import CandidatePlan, plan_job
from app.core.records.job import Stage
from app.core.records.specs import Recipe
from workers.child.ladder import AS_ASKED, Step, Try, next_step
from workers.child.layer_checkpoints import LayerCheckpoints
from workers.child.layer_solver import CalibratedLayer
from workers.child.pipeline import Pipeline
from workers.child.quality_report import Outcome
from workers.child.statistics_store import StatisticsStore
from workers.modeling.decoder import Decoder
from workers.quantization.calibration import CalibrationPass
from workers.texts.windows import Windows


class TargetSearch:
    """Adds candidates to a pipeline whose recipes as asked have been judged."""

    def __init__(self, pipeline: Pipeline, calibration: Windows, evaluation: Windows) -> None:
        self.pipeline, self.calibration, self.evaluation = pipeline, calibration, evaluation
        self.statistics: StatisticsStore = pipeline.open_statistics(calibration)
        self.rungs: dict[int, tuple[str, str]] = {}  # by recipe_index: rung, and why it was tried

    def run(self) -> None:
        pipeline = self.pipeline
        while all(pipeline.excess(outcome) > 1 for outcome in pipeline.outcomes):
            self.remove_losers()
            step = next_step(self.tries(), pipeline.plan.architecture, self.refusal)
            for reason in step.passed:
                pipeline.account.note("rung_passed", reason)
            if step.recipe is None:
                pipeline.account.note("ladder_ended", "no rung of the ladder is left")
                return
            self.attempt(step, step.recipe)

    def tries(self) -> list[Try]:
        pipeline = self.pipeline
        return [
            Try(
                rung=self.rungs.get(outcome.candidate.recipe_index, (AS_ASKED, ""))[0],
                candidate=outcome.candidate,
                kl=math.inf if math.isnan(outcome.quality.kl) else outcome.quality.kl,
                errors=relative_errors(outcome, pipeline),
            )
            for outcome in pipeline.outcomes
        ]

    def refusal(self, recipe: Recipe) -> str | None:
        """Why the model or a format can't hold the recipe, or None."""
        try:
            self.planned(recipe)
        except RecipeUnsupported as fault:
            return fault.message
        return None

    def planned(self, recipe: Recipe) -> CandidatePlan:
        """The recipe as the pipeline's next candidate."""
        pipeline = self.pipeline
        spec = pipeline.spec.model_copy(update={"recipe": recipe})
        plan = plan_job(spec, pipeline.checkpoint.config, pipeline.checkpoint.tensors)
        return plan.candidates[0].model_copy(update={"recipe_index": len(pipeline.outcomes)})

    def attempt(self, step: Step, recipe: Recipe) -> None:
        """Solve, pack and judge one more recipe, from the statistics."""
        pipeline, candidate = self.pipeline, self.planned(recipe)
        index = candidate.recipe_index
        figures = pipeline.figures(pipeline.outcomes[step.base])
        reason = (
            f"recipe {step.base} has {figures['perplexity_ratio']:.4f} times the "
            f"original's perplexity and a KL of {figures['kl']:.4f}"
        )
        self.rungs[index] = (step.rung, reason)
        pipeline.account.note("ladder", f"{reason}; trying {step.rung} as recipe {index}")
        pipeline.account.next_span()
        identity = pipeline.identity(self.calibration, recipe=recipe.model_dump())
        checkpoints = LayerCheckpoints(pipeline.assignment.work_folder / CHECKPOINTS, identity, pipeline.send)
        self.solve_layers(candidate, checkpoints)
        pipeline.judge((candidate,), checkpoints, self.evaluation)

    def solve_layers(self, candidate: CandidatePlan, checkpoints: LayerCheckpoints) -> None:
        pipeline, index = self.pipeline, candidate.recipe_index
        layers = range(pipeline.plan.num_layers)
        waiting = [n for n in layers if not checkpoints.is_ours(checkpoints.layer_key(index, n))]
        if not waiting:
            return
        # A chain of quantized layers goes through all after the first one that is missing.
        rest = layers[waiting[0] :]
        self.restore_statistics()
        decoder = pipeline.decoder()
        window = CalibrationPass(decoder, [self.calibration.tokens[:1]])  # for the equivalence check
        with pipeline.ranks(self.calibration, rest, (candidate,), calibrates=False) as ranks:
            chains = pipeline.start_chains((candidate,), decoder, self.calibration, ranks)
            chains.catch_up(rest.start, checkpoints)
            for layer in rest:
                pipeline.solve(candidate, self.calibrated(decoder, layer), window, chains, checkpoints)
                pipeline.account.progress(0.6 * (layer + 1) / len(layers), layer + 1)

    def calibrated(self, decoder: Decoder, layer: int) -> CalibratedLayer:
        device = self.pipeline.device
        weights = {
            name: value.to(device, torch.float32) for name, value in decoder.layer_weights(layer).items()
        }
        return CalibratedLayer(layer, weights, self.statistics.load(layer).to(device))

    def restore_statistics(self) -> None:
        """Another calibration pass over what an earlier attempt took with it."""
        pipeline = self.pipeline
        missing = self.statistics.missing(pipeline.plan.num_layers)
        if not missing:
            return
        pipeline.account.note(
            "statistics_lost",
            f"statistics of {len(missing)} layers are gone; another calibration pass makes them anew",
        )
        checkpoints = pipeline.open_checkpoints(self.calibration)
        layers = range(missing[0], missing[-1] + 1)
        with pipeline.ranks(self.calibration, layers) as ranks:
            run = pipeline.start_pass(self.calibration, checkpoints, missing[0], ranks)
            with pipeline.account.stage(Stage.CALIBRATING):
                for layer in layers:
                    self.statistics.save(layer, pipeline.collect(run, run.decoder.layer_weights(layer)))

    def remove_losers(self) -> None:
        """Only the best try so far can still be published: the disk should not hold all of them."""
        best = min(self.pipeline.outcomes, key=self.pipeline.excess)
        for outcome in self.pipeline.outcomes:
            if outcome is not best:
                for folder in outcome.folders:
                    shutil.rmtree(folder.folder, ignore_errors=True)

    def report(self) -> tuple[TryReport, ...]:
        """Every try with its figures, in the order in which they were made."""
        account = self.pipeline.account
        tries = []
        for outcome in self.pipeline.outcomes:
            candidate = outcome.candidate
            rung, reason = self.rungs.get(candidate.recipe_index, (AS_ASKED, "the job's recipe"))
            figures = self.pipeline.figures(outcome)
            tries.append(
                TryReport(
                    rung=rung,
                    reason=reason,
                    recipe_index=candidate.recipe_index,
                    label=candidate.label,
                    recipe=candidate.recipe,
                    perplexity_ratio=float(figures["perplexity_ratio"]),
                    kl=outcome.quality.kl,
                    bytes=outcome.bytes,
                    bits_per_weight=candidate.bits_per_weight,
                    seconds=sum(account.candidate_seconds[candidate.recipe_index].values()),
                    meets_target=self.pipeline.excess(outcome) <= 1,
                )
            )
        return tuple(tries)


def relative_errors(outcome: Outcome, pipeline: Pipeline) -> dict[str, float]:
    """By full name: a linear's loss as a share of its output's mean square."""
    return {
        pipeline.plan.architecture.layer_prefix(layer.layer) + linear.linear: linear.loss / linear.energy
        for layer in outcome.layers
        for linear in layer.linears
        if linear.loss is not None and linear.energy
    }
