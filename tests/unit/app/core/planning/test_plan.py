"""The plan: predicted sizes are the written ones, and what a caller should know is noted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from app.core.errors import RecipeUnsupported
from app.core.planning.plan import Plan, plan_job
from app.core.records.specs import Override, Recipe
from tests.tiny_models import EngineRun, random_model, save_model, tiny_spec
from tests.unit.app.core.planning.headers import WEIGHTS_PER_LAYER, asked, planned
from workers.modeling.checkpoint import Checkpoint


def test_a_plan_counts_the_model() -> None:
    plan = planned()
    assert plan.num_layers == 2
    assert plan.parameters == 1000 * 192 + 192 + 2 * (WEIGHTS_PER_LAYER + 192)
    assert plan.model_bytes == 2 * plan.parameters
    assert plan.layer_bytes == 2 * (WEIGHTS_PER_LAYER + 192)
    assert plan.dtype == "bfloat16"
    assert plan.notes == ()
    linears = plan.candidates[0].linears
    assert [linear.name for linear in linears[:2]] == [
        "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj",
    ]  # fmt: skip
    assert sum(linear.parameters for linear in linears) == 2 * WEIGHTS_PER_LAYER


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("down_proj", 2),
        ("model.layers.0.mlp.down_proj", 1),
        (r"re:.*\.1\.mlp\..*", 3),
        ("re:down_proj", 0),  # a pattern must match the whole name
        ("proj", 0),
    ],
)
def test_ignored_linears_keep_their_precision(pattern: str, kept: int) -> None:
    candidate = planned(asked(ignore=["lm_head", pattern])).candidates[0]
    found = [linear for linear in candidate.linears if linear.scheme is None]
    assert len(found) == kept
    assert all(linear.reason == f"ignored by {pattern!r}" for linear in found)


def test_the_last_override_that_matches_wins() -> None:
    overrides = [
        Override(match=r"re:.*\.0\..*", bits=8),
        Override(match="down_proj", bits=3, group_size=32),
        Override(match=r"re:.*\.1\.mlp\.down_proj", group_size=64),
    ]
    candidate = planned(asked(overrides=[o.model_dump() for o in overrides])).candidates[0]
    found = {
        linear.name.removeprefix("model.layers."): (linear.scheme.bits, linear.scheme.group_size)
        for linear in candidate.linears
        if linear.scheme
    }
    assert found["0.self_attn.q_proj"] == (8, 64)
    assert found["0.mlp.down_proj"] == (3, 32)
    assert found["1.mlp.down_proj"] == (3, 64)
    assert found["1.mlp.up_proj"] == (4, 64)


@pytest.mark.parametrize(
    ("recipe", "size"),
    [
        ({}, 64),  # 192 and 320
        ({"ignore": ["lm_head", "mlp.down_proj"]}, 64),
        ({"ignore": ["lm_head", "re:.*"], "indivisible": "refuse"}, None),
        ({"overrides": [{"match": "re:.*", "group_size": 32}]}, 128),
        ({"indivisible": "nearest"}, 128),
        ({"group_size": 32}, 32),
        ({"group_size": -1}, -1),
    ],
)
def test_an_open_group_size_is_the_largest_that_divides_all_inputs(
    recipe: dict[str, Any], size: int | None
) -> None:
    spec = asked(**{"group_size": "auto", **recipe})
    if size is None:
        with pytest.raises(RecipeUnsupported, match="ignores every linear"):
            planned(spec)
        return
    plan = planned(spec)
    assert plan.candidates[0].recipe.group_size == size
    chosen = recipe.get("group_size") is None and size != 128
    assert bool(plan.choices) is chosen
    assert set(plan.choices) <= set(plan.notes)
    if chosen:
        assert plan.choices == (
            "recipe 0: group_size 64, the largest that divides all inputs: "
            "model.layers.0.self_attn.q_proj has in_features=192",
        )
        # The number is frozen: planned again it is the same, and nobody's choice.
        again = planned(spec.with_recipes([plan.candidates[0].recipe]))
        assert (again.candidates, again.choices) == (plan.candidates, ())


def test_patterns_that_match_nothing_are_noted() -> None:
    plan = planned(asked(ignore=["lm_head", "mlp.gate"], overrides=[{"match": "re:down", "bits": 8}]))
    assert plan.notes == (
        "recipe 0: `ignore` names 'mlp.gate', which matches no linear of the model",
        "recipe 0: `overrides` names 're:down', which matches no linear of the model",
    )


@pytest.mark.parametrize(
    ("recipe", "idle"),
    [
        ({"method": "rtn", "search": {"clip": False}}, ["clip"]),
        ({"method": "gptq", "search": {"clip": False, "strategy": "evolutionary"}}, ["strategy"]),
        ({"search": {"epochs": 3, "seed": 1, "grid_points": 4}}, ["epochs", "seed"]),
        ({"search": {"strategy": "evolutionary", "seed": 1, "budget": 20}}, []),
        ({"method": "omniquant", "search": {"epochs": 3, "budget": 20}}, ["budget"]),
    ],
)
def test_options_that_a_method_passes_over_are_noted(recipe: dict[str, Any], idle: list[str]) -> None:
    notes = planned(asked(**recipe)).notes
    assert [note.split("`")[1] for note in notes] == [f"search.{name}" for name in idle]


@pytest.mark.parametrize(("symmetric", "noted"), [(False, 1), (True, 0)])
def test_files_that_transformers_cannot_open_are_noted(*, symmetric: bool, noted: int) -> None:
    plan = planned(asked(symmetric=symmetric, overrides=[{"match": "down_proj", "bits": 8}]))
    assert len(plan.notes) == noted
    assert all("several asymmetric schemes" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("name", "bits", "words"),
    [
        ("gptq", 8, []),
        ("gptq", 3, ["GPTQModel opens gptq files of 3 bits; vLLM 0.33 and SGLang 0.5.23 take 4 and 8 bits"]),
        ("compressed-tensors", 8, []),
        ("compressed-tensors", 2, ["files of 2 bits on NVIDIA GPUs alone; SGLang 0.5.23 takes 4 and 8 bits"]),
        ("compressed-tensors", 3, ["files of 3 bits on NVIDIA GPUs", "compressed-tensors 0.18 or later"]),
        ("awq", 4, []),
    ],
)
def test_what_few_servers_open_is_noted(name: str, bits: int, words: list[str]) -> None:
    notes = planned(asked(name, bits=bits, symmetric=name == "gptq")).notes
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))


EXPERTS_KEPT = {"ignore": ["lm_head", "re:.*experts.*"]}
EXPERTS_WIDE = {"overrides": [{"match": "re:.*experts.*", "bits": 8}]}


@pytest.mark.parametrize(
    ("name", "recipe", "word"),
    [
        ("compressed-tensors", {}, "asymmetric experts"),
        ("compressed-tensors", {"symmetric": True}, None),
        ("compressed-tensors", {"symmetric": True, **EXPERTS_WIDE}, None),
        ("compressed-tensors", {"symmetric": True, **EXPERTS_KEPT}, "keep their precision"),
        ("compressed-tensors", EXPERTS_KEPT, "keep their precision"),
        ("awq", {}, "not of experts"),
        ("gptq", {"symmetric": True}, None),
        ("gptq", {"symmetric": True, **EXPERTS_KEPT}, "SGLang 0.5.23 reads all experts"),
        ("gptq", {"symmetric": True, **EXPERTS_WIDE}, None),  # most linears are experts: theirs is the base
    ],
)
def test_files_of_experts_that_loaders_cannot_open_are_noted(
    tmp_path: Path, name: str, recipe: dict[str, object], word: str | None
) -> None:
    sizes = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "max_position_embeddings": 512}
    sparse = random_model("qwen3_moe", num_experts=4, **sizes)
    checkpoint = Checkpoint(save_model(sparse, tmp_path))
    notes = plan_job(asked(name, group_size=32, **recipe), checkpoint.config, checkpoint.tensors).notes
    assert len(notes) == (0 if word is None else 1)
    assert all(str(word) in note for note in notes)


def test_what_gptqmodel_cannot_open_is_noted(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(random_model("phi3"), tmp_path))
    for name, noted in (("gptq", 1), ("compressed-tensors", 0)):
        spec = asked(name, symmetric=True, group_size=32)
        notes = plan_job(spec, checkpoint.config, checkpoint.tensors).notes
        assert len([note for note in notes if "GPTQModel does not find" in note]) == noted


def test_bits_per_weight_count_scales_and_zero_points() -> None:
    assert planned(asked("awq")).candidates[0].bits_per_weight == pytest.approx(4 + 20 / 64)
    whole_rows = planned(asked(group_size=-1, symmetric=True, bits=8)).candidates[0]
    assert 8 < whole_rows.bits_per_weight < 8.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_predicted_sizes_are_the_written_ones(tmp_path: Path, dtype: torch.dtype) -> None:
    """All bytes of the files but their headers."""
    model = save_model(random_model("qwen2", dtype, tie_word_embeddings=True), tmp_path / "model")
    recipes = (
        Recipe(group_size=32, method="rtn"),
        Recipe(group_size=64, method="rtn", ignore=("down_proj",)),
    )
    run = EngineRun(tiny_spec(recipes, formats=("awq", "compressed-tensors")), model, tmp_path / "work")
    check_sizes(run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_predicted_sizes_of_gptq_are_the_written_ones(tmp_path: Path, dtype: torch.dtype) -> None:
    model = save_model(random_model("qwen2", dtype), tmp_path / "model")
    eight = Override(match="down_proj", bits=8, group_size=64)
    recipes = (
        Recipe(bits=3, group_size=-1, symmetric=True, method="rtn"),
        Recipe(bits=2, group_size=32, symmetric=True, method="rtn", overrides=(eight,)),
    )
    check_sizes(EngineRun(tiny_spec(recipes, formats=("gptq", "compressed-tensors")), model, tmp_path / "w"))


@pytest.mark.parametrize("recipe", [
    Recipe(method="rtn", bits=3, group_size=32, symmetric=True),
    Recipe(method="rtn", bits=2, group_size=-1),
    Recipe(method="rtn", bits=8, group_size=64, overrides=(Override(match="down_proj", bits=3),)),
])  # fmt: skip
def test_predicted_sizes_of_other_widths(tmp_path: Path, recipe: Recipe) -> None:
    model = save_model(random_model("llama", torch.float16), tmp_path / "model")
    check_sizes(EngineRun(tiny_spec(recipe), model, tmp_path / "work"))


def check_sizes(run: EngineRun) -> None:
    assert run.finished.outputs
    for output in run.finished.outputs:
        written = 0
        for file in (run.work / output.folder).glob("*.safetensors"):
            with file.open("rb") as opened:
                written += file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")
        candidate = run.opened.plan.candidates[output.recipe_index]
        assert candidate.output_bytes[output.format] == written


def test_plans_are_records() -> None:
    plan = planned()
    assert Plan.model_validate(json.loads(plan.model_dump_json())) == plan
