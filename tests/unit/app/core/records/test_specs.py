"""The job's body: what a recipe may combine, what it is called, what a target may ask for."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from app.core.records.specs import CalibrationSpec, EvaluationSpec, JobSpec, Recipe, TargetSpec


@pytest.mark.parametrize(
    ("changes", "label", "gptq", "clip"),
    [
        ({"method": "rtn", "group_size": 128}, "rtn w4 g128", False, False),
        ({}, "awq w4", False, True),
        ({"rounding": "gptq", "bits": 3, "group_size": 32}, "awq+gptq w3 g32", True, True),
        ({"method": "gptq", "group_size": -1, "symmetric": True}, "gptq w4 channel sym", True, True),
        ({"method": "gptq", "search": {"clip": False}}, "gptq w4", True, False),
    ],
)
def test_a_recipe_says_how_it_rounds(changes: dict[str, object], label: str, gptq: bool, clip: bool) -> None:
    recipe = Recipe.model_validate(changes)
    assert (recipe.label, recipe.rounds_with_gptq, recipe.searches_clip) == (label, gptq, clip)


def test_plain_rounding_is_not_gptq_rounding() -> None:
    with pytest.raises(ValidationError, match="use method gptq"):
        Recipe.model_validate({"method": "rtn", "rounding": "gptq"})


@pytest.mark.parametrize(
    "target",
    [
        {},
        {"on_miss": "publish"},
        {"max_perplexity_ratio": 0},
        {"max_kl": -0.1},
        {"max_kl": 0.1, "on_miss": "retry"},
        {"max_kl": 0.1, "max_bits": 4},
    ],
)
def test_a_target_without_a_usable_limit_is_refused(target: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="target"):
        JobSpec.model_validate({"model": "org/name", "target": target})


def test_both_limits_must_hold() -> None:
    target = TargetSpec(max_perplexity_ratio=1.1, max_kl=0.02)
    assert target.excess(1.1, 0.02) == pytest.approx(1)
    assert target.excess(1.0, 0.04) == pytest.approx(2)
    assert target.excess(2.2, 0.01) == pytest.approx(2)
    assert target.limits_text == "at most 1.1 times and a KL of at most 0.02"


def test_one_limit_leaves_the_other_free() -> None:
    assert TargetSpec(max_kl=0.5).excess(1000.0, 0.25) == pytest.approx(0.5)
    assert TargetSpec(max_perplexity_ratio=1.0).excess(0.5, 99.0) == pytest.approx(0.5)


def test_broken_figures_never_meet_a_target() -> None:
    assert TargetSpec(max_kl=1.0).excess(1.0, math.nan) == math.inf


def test_a_recovery_that_is_too_low_misses_beside_other_limits() -> None:
    target = TargetSpec(max_kl=0.1, min_recovery=0.99)
    assert target.excess(1.0, 0.05, 0.99) == pytest.approx(1)
    assert target.excess(1.0, 0.05, 0.9) == pytest.approx(1.1)
    assert target.excess(1.0, 0.2, 1.0) == pytest.approx(2)
    assert target.excess(1.0, 0.05, None) == target.excess(1.0, 0.05, 0.0) == math.inf
    assert TargetSpec(max_kl=0.1).excess(1.0, 0.05, None) == pytest.approx(0.5)
    assert target.limits_text == "a KL of at most 0.1 and 0.99 of the task scores"


@pytest.mark.parametrize(
    ("evaluation", "target", "field"),
    [
        ({}, {"min_recovery": 0.99}, ("target",)),
        ({"tasks": ["builtin:nothing"]}, None, ("evaluation", "tasks", 0)),
        ({"tasks": ["../tasks/own.yaml"]}, None, ("evaluation", "tasks", 0)),
        ({"tasks": ["arc_easy", "arc_easy"]}, None, ("evaluation", "tasks")),
        ({"tasks": ["arc_easy"], "task_limit": 0}, None, ("evaluation", "task_limit")),
        ({"tasks": ["arc_easy"]}, {"min_recovery": 0}, ("target", "min_recovery")),
    ],
)
def test_tasks_and_their_target_are_checked(
    evaluation: dict[str, object], target: dict[str, object] | None, field: tuple[str | int, ...]
) -> None:
    with pytest.raises(ValidationError) as refusal:
        JobSpec.model_validate({"model": "hf:a/b", "evaluation": evaluation, "target": target})
    assert [fault["loc"] for fault in refusal.value.errors()] == [field]


@pytest.mark.parametrize(
    ("value", "use"),
    [(True, "always"), (False, "auto"), ("auto", "auto"), ("never", "never"), ("always", "always")],
)
def test_uses_of_the_chat_template_have_names_and_older_values(value: object, use: str) -> None:
    for section in (CalibrationSpec, EvaluationSpec):
        assert section.model_validate({"chat_template": value}).chat_template == use
        assert section().chat_template == "auto"
    for bad in (1, "yes", None):
        with pytest.raises(ValidationError):
            CalibrationSpec.model_validate({"chat_template": bad})


def test_no_model_writes_what_it_is_judged_on() -> None:
    assert CalibrationSpec(dataset="self").is_own_answers
    assert not CalibrationSpec(dataset="hf:org/self/a.txt").is_own_answers
    with pytest.raises(ValidationError, match="no model may write what it is judged on"):
        EvaluationSpec(dataset="self")


def test_tasks_have_bundled_names_or_those_of_lm_eval() -> None:
    names = ("builtin:continuation", "builtin:agreement", "mmlu", "darijammlu_arabic_language_(general)")
    spec = JobSpec.model_validate(
        {"model": "hf:a/b", "evaluation": {"tasks": names}, "target": {"min_recovery": 0.99}}
    )
    assert spec.evaluation.tasks == names
