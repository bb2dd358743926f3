"""A job from model folder to checked output folders: the steps on one page.

    check the model, read text -> calibrate, and solve each layer for every recipe -> pack -> verify
    -> evaluate
    -> with a target: further recipes from the same statistics, until one meets it -> report

A finished layer is a checkpoint; a run that finds checkpoints of the same work goes on after them.
"""

from __future__ import annotations

from app.core.child.assignment import REPORT, Assignment, Finished, OutputFolder
from app.core.errors import TargetMissed
from app.core.jobs.report import OriginalReport, Report, TryReport
from kernels import fallbacks
from workers.child.account import Send
from workers.child.pipeline import Pipeline
from workers.child.quality_report import (
    Outcome,
    candidate_report,
    environment,
    peak_rss_bytes,
    peak_vram_bytes,
    text_entry,
)
from workers.child.stamped_files import identity_digest
from workers.child.target_search import TargetSearch
from workers.texts.windows import Windows


class JobRun:
    """One run of one assignment."""

    def __init__(self, assignment: Assignment, send: Send) -> None:
        self.assignment, self.spec = assignment, assignment.spec
        self.pipeline = Pipeline(assignment, send)

    def run(self) -> Finished:
        """The whole job. Raises NibbleError with the reason when it can't succeed."""
        with self.pipeline.writer:
            return self.run_steps()

    def run_steps(self) -> Finished:
        pipeline = self.pipeline
        for message in self.assignment.model_notes:
            pipeline.account.note("model_files", message)
        for message in pipeline.plan.notes:
            pipeline.account.note("plan", message)
        pipeline.check_shapes()
        calibration, evaluation = pipeline.read_texts()
        checkpoints = pipeline.open_checkpoints(calibration)
        if not checkpoints.is_done(0, len(pipeline.plan.candidates)):
            pipeline.check_weights()  # a resumed run has done so before
        statistics = None if self.spec.target is None else pipeline.open_statistics(calibration)
        pipeline.account.begin(open_ended=self.spec.target is not None)
        resumed_at = pipeline.calibrate(calibration, checkpoints, statistics)
        pipeline.judge(pipeline.plan.candidates, checkpoints, evaluation)
        tries: tuple[TryReport, ...] = ()
        if self.spec.target is not None:
            search = TargetSearch(pipeline, calibration, evaluation)
            search.run()
            tries = search.report()
        report = self.report(calibration, evaluation, resumed_at)
        return self.finish(report.model_copy(update={"tries": tries}))

    def finish(self, report: Report) -> Finished:
        """Write the report and name the folders that are published.

        Raises TargetMissed if no candidate meets the target and misses are not to be published.
        """
        chosen = self.chosen()
        published = tuple(outcome.candidate.recipe_index for outcome in chosen)
        for sentence in fallbacks.noted():
            self.pipeline.account.note("kernel_fallback", sentence)
        notes = tuple(self.pipeline.account.notes)
        report = report.model_copy(update={"published": published, "notes": notes})
        path = self.assignment.work_folder / REPORT
        path.write_text(report.model_dump_json(indent=1), "utf-8")
        if not chosen:
            raise self.target_missed()
        outputs = tuple(
            OutputFolder(
                recipe_index=outcome.candidate.recipe_index,
                recipe=outcome.candidate.recipe,
                format=folder.name,
                folder=str(folder.folder.relative_to(self.assignment.work_folder)),
                summary={**self.pipeline.figures(outcome), "bytes": outcome.bytes[folder.name]},
            )
            for outcome in chosen
            for folder in outcome.folders
        )
        return Finished(report=REPORT, outputs=outputs)

    def chosen(self) -> list[Outcome]:
        """What is published: all without a target; with one, the smallest outcome that meets it."""
        outcomes, target = self.pipeline.outcomes, self.spec.target
        if target is None:
            return outcomes
        met = [outcome for outcome in outcomes if self.pipeline.excess(outcome) <= 1]
        if met:
            return [min(met, key=lambda outcome: sum(outcome.bytes.values()))]
        if target.on_miss == "fail":
            return []
        best = min(outcomes, key=self.pipeline.excess)
        missed = self.target_missed().message
        self.pipeline.account.note("target_missed", f"{missed}; it is published as asked")
        return [best]

    def target_missed(self) -> TargetMissed:
        assert self.spec.target is not None
        best = min(self.pipeline.outcomes, key=self.pipeline.excess)
        ratio = float(self.pipeline.figures(best)["perplexity_ratio"])
        return TargetMissed(
            f"the best candidate ({best.candidate.label}) has {ratio:.4f} times the original's perplexity "
            f"and a KL of {best.quality.kl:.4f}; {self.spec.target.wanted} was asked for",
            remedy="use more bits or smaller groups, or set target.on_miss to publish",
        )

    def report(self, calibration: Windows, evaluation: Windows, resumed_at: int) -> Report:
        """All but what is published of it."""
        pipeline, account = self.pipeline, self.pipeline.account
        assert pipeline.original is not None
        recipes = [outcome.candidate.recipe for outcome in pipeline.outcomes]
        return Report(
            model=self.assignment.model_name,
            model_digest=self.assignment.model_digest,
            calibration_digest=calibration.digest,
            recipe_digests=tuple(identity_digest(**recipe.model_dump()) for recipe in recipes),
            calibration={
                **text_entry(self.spec.calibration, calibration),
                "seed": self.spec.calibration.seed,
            },
            evaluation=text_entry(self.spec.evaluation, evaluation),
            original=OriginalReport(perplexity=pipeline.original.perplexity, bytes=pipeline.plan.model_bytes),
            candidates=tuple(
                candidate_report(outcome, pipeline.original, self.spec.target, account)
                for outcome in pipeline.outcomes
            ),
            histograms=tuple(pipeline.histograms),
            prediction=pipeline.prediction,
            stages=dict(account.seconds),
            cpu_seconds=dict(account.cpu_seconds),
            resumed_at_layer=resumed_at,
            peak_rss_bytes=peak_rss_bytes(),
            peak_vram_bytes=peak_vram_bytes(pipeline.device),
            environment=environment(pipeline.device, pipeline.compute_dtype),
        )
