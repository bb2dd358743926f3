"""A target of bytes: recipes that fit, those that give way, and sizes that none reaches."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.core.errors import RecipeUnsupported
from app.core.jobs.submission import check_submission
from app.core.planning.plan import Plan, plan_job
from app.core.planning.size_target import file_bytes, plan_within_size, smaller_recipes
from app.core.records.specs import JobSpec, Recipe, TargetSpec
from app.core.settings import Settings
from tests.unit.app.core.planning.headers import CONFIG, tensors


def job(
    limit: int, *recipes: dict[str, object], formats: tuple[str, ...] = ("compressed-tensors",)
) -> JobSpec:
    body = {"model": "m", "recipe": list(recipes), "formats": formats, "target": {"max_size": limit}}
    return JobSpec.model_validate(body)


def plan_of(spec: JobSpec) -> Plan:
    return plan_job(spec, CONFIG, tensors())


def size(**recipe: object) -> int:
    spec = JobSpec.model_validate({"model": "m", "recipe": recipe})
    return file_bytes(plan_of(spec).candidates[0])


def test_what_fits_stays_as_it_was_asked() -> None:
    spec = job(size(bits=4), {"bits": 4}, {"bits": 3})
    plan = plan_within_size(spec, plan_of)
    assert [candidate.recipe.bits for candidate in plan.candidates] == [4, 3]
    assert plan == plan_of(spec)


@pytest.mark.parametrize(
    ("asked", "limit", "label"),
    [
        ({"bits": 8}, size(bits=4), "awq w4 g64"),
        ({"bits": 8, "symmetric": True}, size(bits=3), "awq w3 g64 sym"),
        ({"bits": 4, "group_size": 32}, size(bits=3, group_size=32), "awq w3 g32"),
        ({"bits": 4}, size(bits=2, group_size=-1), "awq w2 channel"),
        ({"scheme": "fp8", "method": "rtn"}, size(bits=4), "rtn w4 g64"),
        ({"scheme": "nvfp4"}, size(bits=3), "awq w3 g64"),
    ],
)
def test_what_does_not_fit_gives_way_to_the_widest_that_does(
    asked: dict[str, object], limit: int, label: str
) -> None:
    plan = plan_within_size(job(limit, asked), plan_of)
    (candidate,) = plan.candidates
    assert candidate.recipe.label == label
    assert file_bytes(candidate) <= limit
    (choice,) = (note for note in plan.choices if "in place of" in note)
    assert "exceed target.max_size" in choice
    assert choice in plan.notes


def test_only_what_does_not_fit_is_changed() -> None:
    plan = plan_within_size(job(size(bits=3), {"bits": 8}, {"bits": 2}), plan_of)
    assert [candidate.recipe.bits for candidate in plan.candidates] == [3, 2]


def test_every_format_must_fit() -> None:
    """GPTQ files hold more beside the integers."""
    spec = job(10**9, {"symmetric": True, "group_size": 32}, formats=("compressed-tensors", "gptq"))
    both = plan_of(spec).candidates[0].output_bytes
    assert file_bytes(plan_of(spec).candidates[0]) > max(both.values()) > min(both.values())


def test_a_size_that_nothing_reaches_is_refused_with_the_smallest() -> None:
    least = size(bits=2, group_size=-1)
    with pytest.raises(RecipeUnsupported) as refusal:
        plan_within_size(job(least - 1, {"bits": 4}), plan_of)
    assert (refusal.value.code, refusal.value.param) == ("target_size_impossible", "target.max_size")
    assert f"the smallest is awq w2 channel with {least} bytes" in refusal.value.message
    assert refusal.value.remedy == f"raise target.max_size to {least} or more"


def test_formats_bound_what_can_be_reached() -> None:
    """awq holds four bits alone."""
    with pytest.raises(RecipeUnsupported, match="the smallest is awq w4"):
        plan_within_size(job(size(bits=3), {"bits": 4}, formats=("awq",)), plan_of)


def test_smaller_recipes_are_of_the_same_kind_first() -> None:
    labels = [recipe.label for recipe in smaller_recipes(Recipe.model_validate({"scheme": "w8a8"}))]
    assert labels == ["awq w4a8", "awq w8", "awq w4", "awq w3", "awq w2", "awq w2 channel"]


@pytest.mark.parametrize(("text", "size"), [(5000, 5000), ("5GB", 5 * 10**9), ("1.5 GiB", 3 * 2**29)])
def test_sizes_may_be_written_with_units(text: object, size: int) -> None:
    target = TargetSpec.model_validate({"max_size": text})
    assert target.max_size == size
    assert not target.limits_quality
    assert TargetSpec.model_validate_json(target.model_dump_json()) == target
    assert TargetSpec(max_kl=0.1, max_size=target.max_size).limits_quality


def test_a_target_of_bytes_and_quality_needs_both() -> None:
    target = TargetSpec.model_validate({"max_kl": 0.1, "max_size": 1000})
    assert target.excess(1.0, 0.05, size=900) == 0.9
    assert target.excess(1.0, 0.2, size=900) == 2.0
    assert target.excess(1.0, 0.05, size=1500) == 1.5
    assert target.limits_text == "a KL of at most 0.1 and files of at most 1000 bytes"


def test_a_submission_is_recorded_with_what_fits(example_model: Path, tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path, model_roots=(example_model.parent,))

    def checked(limit: int) -> JobSpec:
        body = {"model": example_model.as_uri(), "recipe": {"scheme": "fp8"}, "target": {"max_size": limit}}
        return check_submission(JobSpec.model_validate(body), settings).spec

    assert [recipe.scheme for recipe in checked(10**7).recipes] == ["fp8"]
    assert [recipe.label for recipe in checked(4_700_000).recipes] == ["awq w4a8"]
    with pytest.raises(RecipeUnsupported, match="no recipe makes files of at most 1000 bytes"):
        checked(1000)
