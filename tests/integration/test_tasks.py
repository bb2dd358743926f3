"""Task scores of a job by the real lm-eval: what a stream answers is what lm-eval's own model answers.

`make tasks` installs lm-eval; without it only the refusal is tested.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from app.core.child.assignment import REPORT, Checkpointed, Stage, StageStarted
from app.core.errors import JobFault, NibbleError, TargetMissed, TextRefused
from app.core.jobs.report import Report
from app.core.records.specs import EvaluationSpec, JobSpec, Recipe, SearchSpec, TargetSpec
from tests.tiny_models import EngineRun, assignment, some_text, tiny_spec
from workers.child import target_search, task_scores, work
from workers.child.job_run import run_job
from workers.child.ladder import Step

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (make tasks)"
)
BOTH = ("builtin:continuation", "builtin:agreement")
COARSE = Recipe(method="rtn", bits=2, group_size=32, search=SearchSpec(clip=False))
FINE = Recipe(method="rtn", bits=8, group_size=32)


def job(recipe: Recipe | tuple[Recipe, ...], target: TargetSpec | None = None, limit: int = 40) -> JobSpec:
    evaluation = EvaluationSpec(texts=(some_text("test"),), num_samples=2, tasks=BOTH, task_limit=limit)
    return tiny_spec(recipe, evaluation=evaluation, target=target)


def by_lm_eval(folder: Path, limit: int) -> dict[str, dict[str, float]]:
    """The scores by lm-eval's own model of transformers."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tasks = Path(work.__file__).parent.parent / "texts" / "tasks"
    model: Any = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=8,
    )
    loaded = TaskManager(include_path=str(tasks), include_defaults=False).load(
        ["nibble_continuation", "nibble_agreement"]
    )
    results: Any = evaluate(model, loaded, limit=limit, bootstrap_iters=1000)
    return {name.replace("nibble_", "builtin:"): scores for name, scores in results["results"].items()}


@needs_lm_eval
def test_scores_are_those_of_lm_evals_own_model(tmp_path: Path, example_model: Path) -> None:
    run = EngineRun(job((COARSE, FINE)), example_model, tmp_path)
    coarse, fine = (candidate.tasks for candidate in run.report.candidates)
    assert coarse is not None
    assert fine is not None
    assert [(each.task, each.metric) for each in coarse.scores] == [
        ("builtin:continuation", "acc_norm"),
        ("builtin:continuation", "acc"),
        ("builtin:agreement", "acc"),
    ]
    expected = by_lm_eval(example_model, 40)
    for each in (*coarse.scores, *fine.scores):
        assert each.documents == 40
        assert each.original == pytest.approx(expected[each.task][f"{each.metric},none"])
        assert each.original_standard_error == pytest.approx(
            expected[each.task][f"{each.metric}_stderr,none"]
        )
    assert any(one.quantized != two.quantized for one, two in zip(coarse.scores, fine.scores, strict=True))
    # Eight bits hardly change an answer, and the comparison document by document sees that.
    assert all(abs(each.quantized - each.original) <= 0.05 for each in fine.scores)
    assert all(each.difference_standard_error < each.original_standard_error / 2 for each in fine.scores)
    assert fine.recovery == pytest.approx(1, abs=0.1)
    assert run.report.environment["lm_eval"]
    (first, _) = run.finished.outputs
    assert first.summary["tasks"]["recovery"] == coarse.recovery


@needs_lm_eval
def test_a_target_that_no_recipe_meets_has_tried_further_ones(
    tmp_path: Path, example_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a ladder of one rung: to climb the whole one takes minutes."""
    steps = iter([Step("more bits 1", 0, FINE), Step("more bits 2", 1, None)])
    monkeypatch.setattr(target_search, "next_step", lambda *_: next(steps))
    spec = job(COARSE, TargetSpec(min_recovery=2.0), limit=10)
    with pytest.raises(TargetMissed, match=r"of its task scores; 2 of the task scores was asked for"):
        EngineRun(spec, example_model, tmp_path)
    first, second = Report.model_validate_json((tmp_path / REPORT).read_text()).tries
    assert (first.tasks is not None, second.tasks is not None) == (True, True)
    assert f"and {first.tasks.recovery:.4f} of its task scores" in second.reason  # type: ignore[union-attr]
    originals = [[score.original for score in one.tasks.scores] for one in (first, second) if one.tasks]
    assert originals[0] == originals[1]
    assert second.tasks.recovery == pytest.approx(1, abs=0.15)  # type: ignore[union-attr]


@needs_lm_eval
def test_a_resumed_job_compares_with_the_same_answers(
    tmp_path: Path, example_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    likelihoods = task_scores.likelihoods

    def counting(decoder, requests, models, batch_tokens, on_share):  # type: ignore[no-untyped-def]
        asked.append(len(models))
        return likelihoods(decoder, requests, models, batch_tokens, on_share)

    monkeypatch.setattr(task_scores, "likelihoods", counting)
    spec = job(COARSE, limit=10)
    first = EngineRun(spec, example_model, tmp_path)
    assert Checkpointed(key=task_scores.ANSWERS) in first.messages
    again = EngineRun(spec, example_model, tmp_path)
    assert asked == [2, 1]
    assert first.report.candidates[0].tasks == again.report.candidates[0].tasks
    other = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"task_limit": 11})})
    EngineRun(other, example_model, tmp_path)
    assert asked == [2, 1, 2]


def refusal(spec: JobSpec, model: Path, folder: Path) -> NibbleError:
    """The error of a job, which must come before its model is read."""
    messages: list[object] = []
    with pytest.raises(NibbleError) as caught:
        run_job(assignment(spec, model, folder), messages.append)
    assert [each.stage for each in messages if isinstance(each, StageStarted)] == [Stage.FETCHING]
    return caught.value


def naming(*names: str) -> JobSpec:
    return tiny_spec(evaluation=EvaluationSpec(texts=(some_text("test"),), num_samples=2, tasks=names))


def test_without_lm_eval_the_refusal_names_the_extra(
    tmp_path: Path, example_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "find_spec", lambda name: None)
    fault = refusal(naming(*BOTH), example_model, tmp_path)
    assert isinstance(fault, JobFault)
    assert (fault.code, "nibble[tasks]" in fault.remedy) == ("lm_eval_missing", True)


@needs_lm_eval
def test_tasks_that_no_stream_answers_are_refused_before_the_work(
    tmp_path: Path, example_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    from workers.child import lm_eval_tasks

    folders = [Path(lm_eval.tasks.__file__).parent / name for name in ("arc", "gsm8k")]
    index = lm_eval_tasks.TaskManager(include_path=folders, include_defaults=False)  # the whole takes 15 s
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", lambda **options: index)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, code, words in (
        ("no_such_task", "task_unknown", "no_such_task"),
        ("gsm8k", "task_generates", "generate_until"),
        ("arc_easy", "task_unavailable", "allenai/ai2_arc"),
    ):
        fault = refusal(naming(name), example_model, tmp_path / name)
        assert isinstance(fault, TextRefused)
        assert (fault.code, fault.param) == (code, "evaluation.tasks")
        assert words in fault.message
