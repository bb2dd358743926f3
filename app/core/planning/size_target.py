"""A target of bytes: recipes that the files are too large for give way to the widest that fit.

Sizes are known from headers, so this happens before a job is recorded, and a size that no recipe reaches is
refused with the smallest that one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from app.core.errors import RecipeUnsupported
from app.core.planning.plan import CandidatePlan, Plan
from app.core.records.specs import JobSpec, Recipe

HEADER_BYTES = 600  # at most, of a linear's tensors in the files' headers
WIDTHS = (8, 4, 3, 2)
# Schemes of the same kind that take fewer bytes, before integers for weights alone.
SMALLER_OF_A_KIND = {
    "nvfp4": ("mxfp4",), "nvfp4a16": ("mxfp4a16",),
    **dict.fromkeys(("fp8", "fp8-block", "fp8-static", "w8a8", "w8a8-static"), ("w4a8",)),
}  # fmt: skip
FIXED = ("scheme", "bits", "group_size", "symmetric", "overrides")  # what a smaller recipe replaces

PlanOf = Callable[[JobSpec], Plan]


def file_bytes(candidate: CandidatePlan) -> int:
    """Of the files in the format where they are largest, their headers included."""
    return max(candidate.output_bytes.values()) + HEADER_BYTES * len(candidate.linears)


def plan_within_size(spec: JobSpec, plan_of: PlanOf) -> Plan:
    """The plan of the job, with smaller recipes where those asked for exceed `target.max_size`.

    Raises RecipeUnsupported where even the smallest do.
    """
    plan = plan_of(spec)
    limit = None if spec.target is None else spec.target.max_size
    if limit is None or all(file_bytes(candidate) <= limit for candidate in plan.candidates):
        return plan
    recipes, choices = list[Recipe](), list[str]()
    for index, candidate in enumerate(plan.candidates):
        recipe = candidate.recipe
        if file_bytes(candidate) > limit:
            recipe = widest_within(spec, candidate, limit, plan_of)
            choices.append(
                f"recipe {index}: {recipe.label} in place of {candidate.recipe.label}, whose files of "
                f"{file_bytes(candidate)} bytes exceed target.max_size"
            )
        recipes.append(recipe)
    fitted = plan_of(spec.with_recipes(recipes))
    return fitted.model_copy(
        update={"choices": (*choices, *fitted.choices), "notes": (*choices, *fitted.notes)}
    )


def widest_within(spec: JobSpec, candidate: CandidatePlan, limit: int, plan_of: PlanOf) -> Recipe:
    """The first of the smaller recipes whose files fit. Raises RecipeUnsupported if none do."""
    least = candidate
    for recipe in smaller_recipes(candidate.recipe):
        try:
            (planned,) = plan_of(spec.model_copy(update={"recipe": recipe})).candidates
        except RecipeUnsupported:  # a format does not hold it
            continue
        if file_bytes(planned) <= limit:
            return planned.recipe
        least = min(least, planned, key=file_bytes)
    raise RecipeUnsupported(
        f"no recipe makes files of at most {limit} bytes: the smallest is {least.label} with "
        f"{file_bytes(least)} bytes",
        code="target_size_impossible", remedy=f"raise target.max_size to {file_bytes(least)} or more",
        param="target.max_size",
    )  # fmt: skip


def smaller_recipes(recipe: Recipe) -> Iterator[Recipe]:
    """Recipes of fewer and fewer bytes, by the same method: of its kind first, then integers."""
    body = {key: value for key, value in recipe.model_dump().items() if key not in FIXED}
    for scheme in SMALLER_OF_A_KIND.get(recipe.scheme, ()):
        yield Recipe.model_validate({**body, "scheme": scheme})
    plain = recipe.scheme == "wna16"
    own: dict[str, Any] = {"symmetric": recipe.symmetric} if plain else {}
    size = recipe.group_size if plain else "auto"
    for bits in (bits for bits in WIDTHS if bits < recipe.bits or not plain):
        yield Recipe.model_validate({**body, **own, "bits": bits, "group_size": size})
    yield Recipe.model_validate({**body, **own, "bits": WIDTHS[-1], "group_size": -1})
