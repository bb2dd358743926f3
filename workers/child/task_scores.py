"""Task scores of the original and of candidates on the same documents, and how much of the former remains.

The original's answers are a checkpoint: later candidates and later attempts compare with the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from app.core.child.assignment import CHECKPOINTS, Checkpointed, digest_of
from app.core.jobs.report import TaskScores
from workers.child.layer_files import StampedFolder
from workers.child.recovery import compared
from workers.child.stage_clock import StageClock
from workers.child.work import BATCH_TOKENS, Work
from workers.quantization.continuations import Continuation, Likelihoods, likelihoods
from workers.quantization.evaluation import LoadWeights

if TYPE_CHECKING:  # lm-eval need not be there
    from workers.child.lm_eval_tasks import Answer, LmEvalTasks

ANSWERS = "original-task-answers.safetensors"


def task_scores(
    work: Work, tasks: LmEvalTasks, models: Sequence[LoadWeights], clock: StageClock
) -> list[TaskScores]:
    """The scores of each model beside the original's, which is asked along with them at first."""
    decoder, steps = work.decoder(), work.plan.steps
    stored = answers_folder(work, tasks)
    first = not stored.holds(ANSWERS)
    answers = likelihoods(
        decoder,
        tasks.requests,
        [decoder.layer_weights, *models] if first else models,
        BATCH_TOKENS,
        lambda share: clock.progress(0.84 + 0.15 * share, steps),
    )
    if first:
        original, *answers = answers
        stored.write(ANSWERS, {"log_probability": original.log_probability, "is_greedy": original.is_greedy})
        clock.send(Checkpointed(key=ANSWERS))
    tensors, _ = stored.read(ANSWERS)
    expected = tasks.outcomes(by_request(tasks, Likelihoods(**tensors)))
    return [compared(expected, tasks.outcomes(by_request(tasks, own))) for own in answers]


def answers_folder(work: Work, tasks: LmEvalTasks) -> StampedFolder:
    """Where answers to exactly these questions by this model lie among the checkpoints."""
    assignment = work.assignment
    identity = digest_of([assignment.weights_digest, work.device.type, tasks.requests])
    return StampedFolder(assignment.work_folder / CHECKPOINTS, identity)


def by_request(tasks: LmEvalTasks, answers: Likelihoods) -> dict[Continuation, Answer]:
    pairs = zip(answers.log_probability.tolist(), answers.is_greedy.tolist(), strict=True)
    return dict(zip(tasks.requests, pairs, strict=True))
