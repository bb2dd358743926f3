"""The ladder on scripted figures: which rung follows, what it changes, and where it ends."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from app.core.errors import RecipeUnsupported
from app.core.planning.plan import CandidatePlan, Plan, plan_job
from app.core.planning.size_target import file_bytes
from app.core.records.specs import JobSpec, Override, Recipe, TargetSpec
from app.core.sources.safetensors_header import TensorHeader
from workers.child.ladder import (
    AS_ASKED,
    MAX_PATTERN,
    Step,
    Try,
    groups_of,
    next_step,
    patterns,
    wider_numbers,
)

CONFIG: dict[str, object] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3,
    "hidden_size": 256, "vocab_size": 100, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (256, 256), "self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256), "mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256),
    "mlp.down_proj": (256, 512),
}  # fmt: skip
TENSORS = {
    f"model.layers.{layer}.{name}.weight": TensorHeader(
        dtype="BF16", shape=shape, file="m", start=0, end=2 * shape[0] * shape[1]
    )
    for layer in range(3)
    for name, shape in SHAPES.items()
}
Figure = Callable[[CandidatePlan], float]


class Model:
    """A model in a format, and the tries on it."""

    def __init__(self, *formats: str) -> None:
        self.formats = formats or ("compressed-tensors",)
        self.tries: list[Try] = []

    def plan(self, recipe: Recipe) -> Plan:
        spec = JobSpec.model_validate({"model": "m", "formats": self.formats})
        return plan_job(spec.model_copy(update={"recipe": recipe}), CONFIG, TENSORS)

    def refusal(self, recipe: Recipe) -> str | None:
        try:
            self.plan(recipe)
        except RecipeUnsupported as fault:
            return fault.message
        return None

    def add(self, recipe: Recipe, kl: float, rung: str = AS_ASKED, **errors: float) -> None:
        candidate = self.plan(recipe).candidates[0]
        names = {linear.name: 0.01 for linear in candidate.linears}
        self.tries.append(Try(rung, candidate, kl, {**names, **by_part(candidate, errors)}))

    def next(self) -> Step:
        return next_step(self.tries, self.plan(Recipe()).architecture, self.refusal)

    def climb(self, recipe: Recipe, kl: Figure) -> Step | None:
        """Follow the ladder to a try with KL of at most 1 (None), or to its end."""
        self.add(recipe, kl(self.plan(recipe).candidates[0]))
        for _ in range(40):
            if self.tries[-1].kl <= 1:
                return None
            step = self.next()
            if step.recipe is None:
                return step
            self.add(step.recipe, kl(self.plan(step.recipe).candidates[0]), step.rung)
        raise AssertionError("the ladder never ends")

    @property
    def rungs(self) -> list[str]:
        return [one.rung for one in self.tries]


def by_part(candidate: CandidatePlan, errors: dict[str, float]) -> dict[str, float]:
    """Errors given by a part of the linears' names."""
    return {
        linear.name: error
        for part, error in errors.items()
        for linear in candidate.linears
        if part in linear.name
    }


def never(_: CandidatePlan) -> float:
    return 2.0


def by_width(candidate: CandidatePlan) -> float:
    """Better with more bits per weight, met at 4.5."""
    return 4.5 / candidate.bits_per_weight


def bits(candidate: CandidatePlan, part: str) -> set[int]:
    return {linear.scheme.bits for linear in candidate.linears if linear.scheme and part in linear.name}


def test_the_rungs_follow_in_order() -> None:
    model = Model()
    fall = itertools.count(50, -1)
    end = model.climb(Recipe(bits=3), lambda _: float(next(fall)))
    assert model.rungs[:5] == [AS_ASKED, "finer search", "GPTQ rounding", "groups of 64", "groups of 32"]
    assert model.rungs[5] == "more bits 1"
    assert end is not None
    assert "has the most bits" in end.passed[-1]
    finer, rounded, g64, g32 = (one.candidate.recipe for one in model.tries[1:5])
    assert (finer.search.grid_points, finer.search.strategy) == (40, "evolutionary")
    assert (rounded.rounding, rounded.search, g64.group_size, g32.group_size) == (
        "gptq",
        finer.search,
        64,
        32,
    )
    assert g32.rounding == "gptq"
    assert bits(model.tries[-1].candidate, "") == {8}


def test_it_stops_where_the_target_is_met() -> None:
    model = Model()
    assert model.climb(Recipe(bits=3, group_size=64), by_width) is None
    assert model.tries[-1].kl <= 1
    assert all(one.kl > 1 for one in model.tries[:-1])
    sizes = [one.candidate.output_bytes["compressed-tensors"] for one in model.tries]
    assert sizes == sorted(sizes)


def test_a_rung_that_does_not_help_is_left_behind() -> None:
    model = Model()
    model.add(Recipe(group_size=128), 1.5)
    step = model.next()
    assert step.recipe is not None
    model.add(step.recipe, 1.6, step.rung)
    following = model.next()
    assert following.rung == "GPTQ rounding"
    assert following.recipe == Recipe(
        group_size=128, rounding="gptq"
    )  # of the recipe as asked, not of the finer search


def test_the_ladder_starts_from_the_best_recipe() -> None:
    model = Model()
    model.add(Recipe(bits=3, method="rtn"), 1.9)
    model.add(Recipe(bits=3, group_size=32), 1.2)
    step = model.next()
    assert step.recipe is not None
    assert (step.recipe.method, step.recipe.group_size) == ("awq", 32)


def test_plain_rounding_becomes_a_search() -> None:
    model = Model()
    model.add(Recipe(method="rtn", group_size=128), 2.0)
    step = model.next()
    assert step.recipe is not None
    assert (step.rung, step.recipe.method) == ("finer search", "awq")


@pytest.mark.parametrize(
    "recipe", [Recipe(method="gptq", group_size=128), Recipe(group_size=-1, method="gptq")]
)
def test_gptq_goes_on_with_smaller_groups(recipe: Recipe) -> None:
    model = Model()
    model.add(recipe, 2.0)
    step = model.next()
    assert step.rung == ("groups of 64" if recipe.group_size == 128 else "groups of 128")


def test_omniquant_goes_on_with_gptq_rounding() -> None:
    model = Model()
    model.add(Recipe(method="omniquant", group_size=128), 2.0)
    step = model.next()
    assert (step.rung, step.recipe) == (
        "GPTQ rounding",
        Recipe(method="omniquant", group_size=128, rounding="gptq"),
    )


def test_more_overrides_than_a_recipe_may_have_end_the_ladder_with_the_reason() -> None:
    model = Model()
    many = tuple(Override(match=f"layer {number}", bits=8) for number in range(64))
    model.add(Recipe(method="gptq", group_size=32, overrides=many), 2.0)
    step = model.next()
    assert step.recipe is None
    assert "overrides: at most 64 are allowed" in step.passed[-1]


def test_the_worst_fused_sets_get_bits_first() -> None:
    model = Model()
    model.add(Recipe(bits=3, group_size=32), 2.0, "groups of 32", v_proj=0.02)
    model.tries.insert(0, Try(AS_ASKED, model.tries[0].candidate, 3.0, {}))
    model.tries[1].errors.update(by_part(model.tries[1].candidate, {"layers.1.self_attn.v_proj": 0.9}))
    step = model.next()
    assert step.recipe is not None
    candidate = model.plan(step.recipe).candidates[0]
    assert bits(candidate, "layers.1.self_attn.q_proj") == bits(candidate, "layers.1.self_attn.v_proj")
    assert min(bits(candidate, "layers.1.self_attn.k_proj")) > 3
    assert bits(candidate, "layers.0.mlp") == {3}


def test_each_step_of_more_bits_spends_twice_as_much() -> None:
    model = Model()
    model.climb(Recipe(bits=2, group_size=32, method="gptq"), lambda plan: 90 - plan.bits_per_weight)
    widths = [one.candidate.bits_per_weight for one in model.tries]
    grown = [after - before for before, after in itertools.pairwise(widths)]
    assert grown[0] >= 1 / 8
    assert all(after >= 1.4 * before for before, after in itertools.pairwise(grown[:-1]))
    assert len({one.candidate.recipe for one in model.tries}) == len(model.tries)


def test_a_format_of_one_scheme_ends_the_ladder_with_the_reason() -> None:
    model = Model("awq")
    end = model.climb(Recipe(), never)
    assert end is not None
    assert model.rungs == [AS_ASKED, "finer search", "GPTQ rounding", "groups of 64", "groups of 32"]
    assert "awq" in end.passed[-1]


def test_overrides_of_the_caller_stay() -> None:
    model = Model()
    recipe = Recipe.model_validate(
        {"bits": 3, "group_size": 32, "method": "gptq", "overrides": [{"match": "down_proj", "bits": 4}]}
    )
    model.add(recipe, 2.0)
    step = model.next()
    assert step.recipe is not None
    assert step.recipe.overrides[0] == recipe.overrides[0]
    assert min(bits(model.plan(step.recipe).candidates[0], "down_proj")) >= 4


def test_patterns_fit_into_an_override() -> None:
    architecture = Model().plan(Recipe()).architecture
    numbers = [str(layer) for layer in range(200)]
    found = patterns(architecture, numbers, ("self_attn.q_proj", "self_attn.k_proj"))
    assert len(found) > 1
    assert all(len(pattern) <= MAX_PATTERN for pattern in found)
    recipe = Recipe.model_validate({"overrides": [{"match": match, "bits": 8} for match in found]})
    for layer in (0, 17, 199):
        name = f"model.layers.{layer}.self_attn.k_proj"
        assert sum(override.matches(name) for override in recipe.overrides) == 1


def test_experts_are_named_by_one_pattern() -> None:
    architecture = Model().plan(Recipe()).architecture
    members = tuple(f"mlp.experts.{number}.{part}" for number in range(128) for part in ("w1", "w2"))
    (pattern,) = patterns(architecture, ["3", "5"], members)
    override = Recipe.model_validate({"overrides": [{"match": pattern, "bits": 8}]}).overrides[0]
    assert override.matches("model.layers.5.mlp.experts.77.w2")
    assert not override.matches("model.layers.4.mlp.experts.77.w2")
    assert not override.matches("model.layers.5.mlp.experts.77.w3")


@pytest.mark.parametrize(
    ("scheme", "wider"),
    [
        ("nvfp4", ("fp8", 8, -1)), ("mxfp4", ("fp8", 8, -1)), ("w4a8", ("fp8", 8, -1)),
        ("nvfp4a16", ("wna16", 8, -1)), ("mxfp4a16", ("wna16", 8, -1)), ("fp8", None), ("w8a8", None),
    ],
)  # fmt: skip
def test_a_scheme_is_followed_by_a_wider_one(scheme: str, wider: tuple[str, int, int] | None) -> None:
    changed = wider_numbers(Recipe.model_validate({"scheme": scheme, "method": "gptq"}))
    assert (None if changed is None else (changed.scheme, changed.bits, changed.group_size)) == wider
    assert changed is None or (changed.method, changed.symmetric) == ("gptq", True)


def test_groups_of_a_scheme_stay() -> None:
    assert groups_of(32)(Recipe.model_validate({"scheme": "fp8-block"})) is None


def within(model: Model, recipe: Recipe, room: int, **limits: float) -> TargetSpec:
    """A target of bytes that leaves so much room above the recipe's files."""
    size = file_bytes(model.plan(recipe).candidates[0]) + room
    return TargetSpec.model_validate({"max_size": size, **limits})


@pytest.mark.parametrize("limits", [{}, {"max_kl": 0.1}])
def test_more_bits_stay_within_a_target_of_bytes(limits: dict[str, float]) -> None:
    model = Model()
    recipe = Recipe(bits=3, group_size=32)
    model.add(recipe, 2.0)
    model.add(recipe, 1.9, "groups of 32", v_proj=0.02)
    target = within(model, recipe, 20_000, **limits)
    step = next_step(model.tries, model.plan(Recipe()).architecture, model.refusal, target)
    assert step.recipe is not None
    size = file_bytes(model.plan(step.recipe).candidates[0])
    assert target.max_size is not None
    assert file_bytes(model.tries[0].candidate) < size <= target.max_size


def test_without_a_limit_to_quality_all_bytes_are_spent_at_once() -> None:
    model = Model()
    recipe = Recipe(bits=3, group_size=32)
    model.add(recipe, 2.0)
    model.add(recipe, 1.9, "groups of 32", v_proj=0.02)
    architecture, room = model.plan(Recipe()).architecture, 120_000
    sizes = []
    for limits in ({}, {"max_kl": 0.1}):
        step = next_step(model.tries, architecture, model.refusal, within(model, recipe, room, **limits))
        assert step.recipe is not None
        sizes.append(file_bytes(model.plan(step.recipe).candidates[0]))
    assert sizes[0] > sizes[1]
    model.add(recipe, 1.0, "more bits 1")
    end = next_step(model.tries, architecture, model.refusal, within(model, recipe, 0))
    assert end.recipe is None
    assert "has the most bits that the target's bytes leave" in end.passed[-1]
