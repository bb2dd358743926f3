"""The ladder to a quality target: from the tries so far to the next recipe. A pure function.

    as asked -> finer search -> GPTQ rounding -> smaller groups -> more bits where errors weigh most

Schemes that fix bits and groups are followed by the next wider one instead of the last two.

Each step changes the try with the lowest KL so far: perplexity ratios of near candidates are noise. Bits
are raised for whole fused sets, since servers make one matrix of each: in the order of predicted gain per
byte, each step spending twice as many bytes as the one before. A target of bytes bounds what is spent;
without a limit to quality all that is left is spent at once.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from pydantic import ValidationError

from app.core.errors import field_fault
from app.core.planning.architectures import Architecture
from app.core.planning.plan import CandidatePlan, fused_set
from app.core.planning.size_target import file_bytes
from app.core.records.specs import Bits, Override, Recipe, SearchSpec, TargetSpec

AS_ASKED = "as asked"
FINE_GRID_POINTS = 40
GROUP_SIZES = (128, 64, 32)
WIDTHS: tuple[int, ...] = tuple(sorted(get_args(Bits)))
FIRST_SHARE = 1 / 8  # of one more bit for every weight: what the first step of more bits spends
WIDER: dict[str, dict[str, object]] = {
    **{name: {"scheme": "fp8"} for name in ("nvfp4", "mxfp4", "w4a8")},
    **{name: {"scheme": "w8a16", "group_size": -1, "symmetric": True} for name in ("nvfp4a16", "mxfp4a16")},
}
EXPERT_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # a part of a linear's name in its layer
MAX_PATTERN = 256  # characters of an override's `match`

Refusal = Callable[[Recipe], str | None]  # why a recipe can't be applied, or None
Change = Callable[[Recipe], Recipe | None]


@dataclass(frozen=True)
class Try:
    """One candidate's outcome, as far as it decides what to try next."""

    rung: str
    candidate: CandidatePlan
    kl: float
    errors: dict[str, float]  # by linear: squared error of its output, relative to the output


@dataclass(frozen=True)
class Step:
    """The next recipe to try; the ladder has ended if there is none."""

    rung: str
    base: int  # recipe_index of the try that it changes
    recipe: Recipe | None
    passed: tuple[str, ...] = ()  # rungs that were passed over, each with its reason


def next_step(
    tries: Sequence[Try], architecture: Architecture, refusal: Refusal, target: TargetSpec | None = None
) -> Step:
    """The next rung that changes something and can be held by the model and all formats.

    `refusal` also says where files would exceed the target's bytes.
    """
    best = min(tries, key=lambda one: one.kl)
    recipe, base = best.candidate.recipe, best.candidate.recipe_index
    names = [name for name, _ in RUNGS]
    done = max((names.index(one.rung) for one in tries if one.rung in names), default=-1)
    passed: list[str] = []
    for rung, change in RUNGS[done + 1 :]:
        changed = change(recipe)
        if changed is None:
            continue
        reason = refusal(changed)
        if reason is None:
            return Step(rung, base, changed, tuple(passed))
        passed.append(f"{rung}: {reason}")
    if best.candidate.recipe.scheme != "wna16":
        return Step(
            "wider numbers", base, None, (*passed, f"{recipe.scheme} has no wider scheme of its kind")
        )
    number = 1 + sum(one.rung.startswith("more bits") for one in tries)
    rung = f"more bits {number}"
    spending = spending_of(best.candidate, FIRST_SHARE * 2 ** (number - 1), target)
    try:
        raised = with_more_bits(tries, best, architecture, spending)
    except ValidationError as fault:  # more overrides than a recipe may have
        return Step(rung, base, None, (*passed, f"{rung}: overrides: {field_fault(fault.errors()[0])}"))
    if raised is None or any(one.candidate.recipe == raised for one in tries):
        within = "" if spending.most == math.inf else " that the target's bytes leave"
        ended = f"{rung}: every linear that is quantized has the most bits{within}"
        return Step(rung, base, None, (*passed, ended))
    reason = refusal(raised)
    if reason is not None:
        return Step(rung, base, None, (*passed, f"{rung}: {reason}"))
    return Step(rung, base, raised, tuple(passed))


def altered(recipe: Recipe, **changes: object) -> Recipe:
    return Recipe.model_validate({**recipe.model_dump(), **changes})


# --- rungs: the changed recipe, or None where there is nothing to change


def finer_search(recipe: Recipe) -> Recipe | None:
    if recipe.method not in ("rtn", "awq"):
        return None
    strategies = get_args(SearchSpec.model_fields["strategy"].annotation)
    search = {
        **recipe.search.model_dump(),
        "strategy": "evolutionary" if "evolutionary" in strategies else "grid",
        "grid_points": max(FINE_GRID_POINTS, recipe.search.grid_points),
        "duo_scaling": "both",
        "clip": True,
    }
    finer = altered(recipe, method="awq", search=search)
    return None if finer == recipe else finer


def gptq_rounding(recipe: Recipe) -> Recipe | None:
    if recipe.searches_scales and recipe.rounding == "nearest":
        return altered(recipe, rounding="gptq")
    return altered(recipe, method="gptq") if recipe.method == "rtn" else None


def groups_of(size: int) -> Change:
    def change(recipe: Recipe) -> Recipe | None:
        if recipe.scheme != "wna16":
            return None
        assert recipe.group_size != "auto"
        smaller = recipe.group_size == -1 or recipe.group_size > size
        return altered(recipe, group_size=size) if smaller else None

    return change


def wider_numbers(recipe: Recipe) -> Recipe | None:
    """The recipe with the next wider scheme, for weights alone or for inputs too as before."""
    wider = WIDER.get(recipe.scheme)
    if wider is None:
        return None
    body = recipe.model_dump(exclude={"bits", "group_size", "symmetric", "scheme"})
    return Recipe.model_validate({**body, **wider})


RUNGS: tuple[tuple[str, Change], ...] = (
    ("finer search", finer_search),
    ("GPTQ rounding", gptq_rounding),
    ("wider numbers", wider_numbers),
    *((f"groups of {size}", groups_of(size)) for size in GROUP_SIZES),
)


# --- more bits


@dataclass(frozen=True)
class FusedSet:
    """Linears that servers fuse, in one layer."""

    layer: str
    members: tuple[str, ...]  # names in the layer
    bits: int
    weights: int
    error: float

    def raised(self) -> FusedSet | None:
        """With the next width: the grid's steps, and so the error, shrink with the number of levels."""
        wider = next((bits for bits in WIDTHS if bits > self.bits), None)
        if wider is None:
            return None
        error = self.error * ((2**self.bits - 1) / (2**wider - 1)) ** 2
        return FusedSet(self.layer, self.members, wider, self.weights, error)

    def cost(self) -> float:
        """Bytes of the next width."""
        wider = self.raised()
        return 0.0 if wider is None else self.weights * (wider.bits - self.bits) / 8

    def gain_per_byte(self) -> float:
        wider = self.raised()
        return 0.0 if wider is None else (self.error - wider.error) / self.cost()


@dataclass(frozen=True)
class Spending:
    """Bytes for wider sets: of one step, and the most that the target leaves."""

    step: float
    most: float = math.inf


def spending_of(candidate: CandidatePlan, share: float, target: TargetSpec | None) -> Spending:
    """`share`: of one more bit for every weight."""
    weights = sum(linear.parameters for linear in candidate.linears if linear.scheme is not None)
    step = share * weights / 8
    if target is None or target.max_size is None:
        return Spending(step)
    room = max(0, target.max_size - file_bytes(candidate))
    return Spending(min(step, room) if target.limits_quality else room, room)


def with_more_bits(
    tries: Sequence[Try], best: Try, architecture: Architecture, spending: Spending
) -> Recipe | None:
    """The best try's recipe with more bits for the sets that gain most per byte; None if none is left."""
    sets = list(fused_sets(best, architecture))
    queue = [(-each.gain_per_byte(), index) for index, each in enumerate(sets) if each.raised()]
    if not queue:
        return None
    heapq.heapify(queue)
    spent = 0.0
    while queue and spent < spending.step:
        _, index = heapq.heappop(queue)
        if spent + sets[index].cost() > spending.most:
            continue
        spent += sets[index].cost()
        wider = sets[index].raised()
        assert wider is not None
        sets[index] = wider
        if wider.raised():
            heapq.heappush(queue, (-wider.gain_per_byte(), index))
    first = min((one for one in tries if one.rung == AS_ASKED), key=lambda one: one.kl)
    return mixed_recipe(best.candidate.recipe, first.candidate.recipe.overrides, sets, architecture)


def fused_sets(one: Try, architecture: Architecture) -> Iterator[FusedSet]:
    """The quantized fused sets of a candidate."""
    linears = {linear.name: linear for linear in one.candidate.linears}
    seen = set()
    for name in linears:
        layer, members = fused_set(architecture, name)
        scheme = linears[name].scheme
        if scheme is None or (layer, members) in seen:
            continue
        seen.add((layer, members))
        names = [layer + member for member in members if layer + member in linears]
        weights = sum(linears[member].parameters for member in names)
        kinds: dict[str, list[float]] = {}
        for member in names:  # a token sees few of many experts: their errors count as one
            kinds.setdefault(EXPERT_NUMBER.sub("", member), []).append(one.errors.get(member, 0.0))
        error = sum(sum(errors) / len(errors) for errors in kinds.values())
        yield FusedSet(layer, members, scheme.bits, weights, error)


def mixed_recipe(
    recipe: Recipe, asked: tuple[Override, ...], sets: list[FusedSet], architecture: Architecture
) -> Recipe:
    """`recipe` with the bits of `sets`, as overrides after those that were asked for."""
    if len({each.bits for each in sets}) == 1 and not any(override.bits for override in asked):
        return altered(recipe, bits=sets[0].bits, overrides=asked)
    layers: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    added: list[dict[str, object]] = []
    for each in sets:
        names = [each.layer + name for name in each.members]
        if all(each.bits == bits_asked(recipe, asked, name) for name in names):
            continue
        if each.layer.startswith(architecture.stored_layers + "."):
            number = each.layer.removeprefix(architecture.stored_layers + ".").rstrip(".")
            layers.setdefault((each.bits, each.members), []).append(number)
        else:  # the head
            added += [{"match": name, "bits": each.bits} for name in names]
    added += [
        {"match": match, "bits": bits}
        for (bits, members), numbers in layers.items()
        for match in patterns(architecture, numbers, members)
    ]
    overrides = [override.model_dump() for override in asked] + added
    return altered(recipe, overrides=overrides)


def bits_asked(recipe: Recipe, asked: tuple[Override, ...], name: str) -> int:
    """The width of a linear by the caller's own overrides; the last one that matches counts."""
    return next((o.bits for o in reversed(asked) if o.bits and o.matches(name)), recipe.bits)


def patterns(architecture: Architecture, numbers: list[str], members: tuple[str, ...]) -> list[str]:
    """Regular expressions for these linears of these layers, none longer than an override may be."""
    # All experts of a layer are one fused set, so any number stands for all of theirs.
    kinds = dict.fromkeys(EXPERT_NUMBER.sub("*", member) for member in members)
    names = "|".join(re.escape(kind).replace(r"\*", r"\d+") for kind in kinds)
    pattern = rf"re:{re.escape(architecture.stored_layers)}\.({'|'.join(numbers)})\.({names})"
    if len(pattern) <= MAX_PATTERN:
        return [pattern]
    if len(numbers) > 1:
        half = len(numbers) // 2
        halves = [(numbers[:half], members), (numbers[half:], members)]
    else:
        half = max(1, len(members) // 2)
        halves = [(numbers, members[:half]), (numbers, members[half:])]
    return [pattern for chosen in halves for pattern in patterns(architecture, *chosen)]
