"""One linear of a model under a recipe: its scheme, and groups that must be whole."""

from __future__ import annotations

from app.core.errors import RecipeUnsupported
from app.core.planning.format_limits import Scheme
from app.core.records.specs import Frozen, Recipe, matches

GROUP_SIZES = (128, 64, 32)


class LinearPlan(Frozen):
    """One linear: its scheme, or None with the reason why it keeps its precision."""

    name: str
    out_features: int
    in_features: int
    scheme: Scheme | None
    reason: str | None = None
    fitted: bool = False  # the asked-for groups did not divide in_features

    @property
    def parameters(self) -> int:
        return self.out_features * self.in_features


def plan_linear(recipe: Recipe, name: str, shape: tuple[int, int]) -> LinearPlan:
    scheme, reason = None, None
    ignored = next((pattern for pattern in recipe.ignore if matches(pattern, name)), None)
    if ignored is not None:
        reason = f"ignored by {ignored!r}"
    else:
        bits, group_size = recipe.bits, recipe.group_size
        for override in recipe.overrides:
            if override.matches(name):
                bits = override.bits or bits
                group_size = override.group_size or group_size
        scheme = Scheme(bits=bits, group_size=group_size, symmetric=recipe.symmetric)
    return LinearPlan(name=name, out_features=shape[0], in_features=shape[1], scheme=scheme, reason=reason)


def divides(group_size: int, linear: LinearPlan) -> bool:
    """True if the linear's groups are whole: loaders index scales by in_features // group_size."""
    return group_size == -1 or linear.in_features % group_size == 0


def misfit(linear: LinearPlan) -> str:
    assert linear.scheme is not None
    return f"in_features={linear.in_features} is not a multiple of group_size={linear.scheme.group_size}"


def refuse_indivisible(field: str, linears: tuple[LinearPlan, ...]) -> None:
    """Every group must be whole: loaders index scales by in_features // group_size."""
    for linear in linears:
        if linear.scheme is not None and not divides(linear.scheme.group_size, linear):
            fitting = [size for size in GROUP_SIZES if linear.in_features % size == 0]
            remedy = (
                f"use group_size {fitting[0]}"
                if fitting
                else f"use group_size -1, or add {linear.name.split('.')[-1]!r} to `ignore`"
            )
            raise RecipeUnsupported(
                f"{linear.name}: {misfit(linear)}", code="group_size_indivisible",
                remedy=f"{remedy}, or set `indivisible` to nearest or skip",
                param=f"{field}.group_size",
            )  # fmt: skip


def fit_groups(
    recipe: Recipe, linears: tuple[LinearPlan, ...], fused: list[tuple[str, ...]]
) -> tuple[LinearPlan, ...]:
    """Other groups for linears that theirs do not divide: the nearest smaller ones that do, or none.

    A set that servers fuse takes the same for all of its members.
    """
    found = {linear.name: linear for linear in linears}
    alone = found.keys() - {name for names in fused for name in names}
    for names in [*fused, *((name,) for name in alone)]:
        members = [found[name] for name in names]
        scheme = members[0].scheme
        wrong = next((m for m in members if m.scheme and not divides(m.scheme.group_size, m)), None)
        if scheme is None or wrong is None:
            continue
        sizes = [size for size in GROUP_SIZES if size < scheme.group_size] * (recipe.indivisible == "nearest")
        size = next((size for size in sizes if all(divides(size, member) for member in members)), None)
        changed = None if size is None else scheme.model_copy(update={"group_size": size})
        kept = "kept" if size is None else f"group_size {size}"
        reason = f"{kept}: {misfit(wrong)}" + ("" if wrong.name in names[:1] else f" of {wrong.name}")
        for member in members:
            found[member.name] = member.model_copy(
                update={"scheme": changed, "reason": reason, "fitted": True}
            )
    return tuple(found[linear.name] for linear in linears)
