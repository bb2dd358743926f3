"""A job from model folder to checked output folders: the steps on one page.

    open and check the model, read the texts -> calibrate each layer, and solve it for every recipe
    -> pack, read back, evaluate
    -> with a target: further recipes from the same statistics, until one meets it -> report

A finished layer is a checkpoint; a run that finds checkpoints of the same work goes on after them.
"""

from __future__ import annotations

from pathlib import Path

from app.core.child.assignment import REPORT, Assignment, Finished, OutputFolder
from app.core.errors import TargetMissed
from app.core.records.job import Stage
from app.core.records.specs import TargetSpec
from kernels import fallbacks
from workers.child.candidate_files import CandidateFiles
from workers.child.judging import JudgedCandidate, judge
from workers.child.layer_loop import solve_layers
from workers.child.quality_report import RunResult, prediction_note, report_of
from workers.child.stage_clock import Send, StageClock
from workers.child.target_search import TargetSearch
from workers.child.text_checks import left_out_notes, perplexity_note, repetition_notes
from workers.child.work import JobTexts, Work, check_weights, read_texts, with_checked_shapes, write_answers
from workers.formats.folder import FormatFolder


def run_job(assignment: Assignment, send: Send) -> Finished:
    """The whole job. Raises NibbleError with the reason when it can't succeed."""
    work = Work.open(assignment)
    target = work.spec.target
    clock = StageClock(send, work.device, work.plan.steps)
    send(prediction_note(work))
    for message in assignment.model_notes:
        clock.note("model_files", message)
    for message in (*assignment.choices, *work.plan.notes):
        clock.note("plan", message)

    with clock.stage(Stage.FETCHING):
        work = with_checked_shapes(work, clock)
        if work.spec.calibration.is_own_answers:
            with clock.stage(Stage.CALIBRATING):
                write_answers(work, clock)
        texts = read_texts(work)
        if texts.note is not None:
            clock.note("chat_template_invalid", texts.note)
        for notes in (left_out_notes, repetition_notes):
            for message in notes(texts.calibration, texts.evaluation):
                clock.note("text", message)
        checkpoints = work.checkpoints(clock)
        files = [CandidateFiles.of(work, candidate, checkpoints) for candidate in work.plan.candidates]
        if not checkpoints.is_done(0, len(files)):
            check_weights(work)  # a resumed run has done so before

    clock.begin(open_ended=target is not None)
    statistics = None if target is None else work.statistics()
    solved = solve_layers(work, texts.calibration, files, statistics, clock)
    original, judged = judge(work, texts, files, clock)
    unusual = perplexity_note(original.quality.perplexity, work.plan.vocab_size)
    if unusual is not None:
        clock.note("text", unusual)
    if target is not None and statistics is not None:
        judged = TargetSearch(work, texts, original, statistics, clock).run(target, judged)
    return publish(work, texts, RunResult(solved, original.quality, judged), clock)


def publish(work: Work, texts: JobTexts, result: RunResult, clock: StageClock) -> Finished:
    """Write the report and name the folders that are published.

    Raises TargetMissed if no candidate meets the target and misses are not to be published.
    """
    target, folder = work.spec.target, work.assignment.work_folder
    chosen = result.chosen(target)
    if target is not None:
        for judged in chosen or [result.best(target)]:
            if judged.doubt(target) is not None:
                message = f"{judged.candidate.label}: target {judged.verdict(target)}"
                clock.note("target_within_noise", message)
    missed = None if target is None else target_missed(target, result.best(target))
    if missed is not None and chosen:
        clock.note("target_missed", f"{missed.message}; it is published as asked")
    for sentence in fallbacks.noted():
        clock.note("kernel_fallback", sentence)
    report = report_of(work, texts, result, clock)
    (folder / REPORT).write_text(report.model_dump_json(indent=1), "utf-8")
    if missed is not None and not chosen:
        raise missed
    outputs = tuple(output_of(judged, packed, folder) for judged in chosen for packed in judged.folders)
    return Finished(report=REPORT, outputs=outputs)


def output_of(judged: JudgedCandidate, packed: FormatFolder, work_folder: Path) -> OutputFolder:
    return OutputFolder(
        recipe_index=judged.candidate.recipe_index,
        recipe=judged.candidate.recipe,
        format=packed.name,
        folder=str(packed.folder.relative_to(work_folder)),
        summary={**judged.figures, "bytes": judged.bytes[packed.name]},
    )


def target_missed(target: TargetSpec, best: JudgedCandidate) -> TargetMissed | None:
    """The error that says how far even the best candidate misses the target; None if it meets it."""
    if best.excess(target) <= 1:
        return None
    return TargetMissed(
        f"the best candidate ({best.candidate.label}) has {best.figures_text} in {best.size} bytes; "
        f"{target.limits_text} was asked for",
        remedy="use more bits or smaller groups, or set target.on_miss to publish",
    )
