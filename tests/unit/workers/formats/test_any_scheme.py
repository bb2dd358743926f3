"""Folders of random schemes: what is read back was computed, and loaders find each linear's scheme."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.formats.registry import FormatName
from app.core.planning.plan import Plan, plan_job
from app.core.records.specs import JobSpec, Recipe
from tests.tiny_models import OTHER_MODELS, EngineRun, random_model, save_model, tiny_spec
from tests.unit.workers.formats.loaders import awq_transformers, ct_library, gptq_server
from tests.unit.workers.formats.test_layouts_of_formats import random_weight
from workers.formats.folder import FormatFolder
from workers.modeling.checkpoint import Checkpoint
from workers.quantization.layer import LayerResult

SETS = (
    r"re:.*self_attn\.(q|k|v)_proj", "o_proj", r"re:.*\.(gate|up)_proj", "down_proj", r"re:.*layers\.1\..*",
    r"re:.*layers\.0\.self_attn\.o_proj", r"re:.*layers\.1\.mlp\.down_proj",
)  # fmt: skip
FUSED = {"qkv_proj": "q_proj", "gate_up_proj": "up_proj"}  # how vLLM names them, and one of the parts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    return [
        Checkpoint(save_model(random_model("qwen2", dtype, vocab_size=64), tmp_path_factory.mktemp("model")))
        for dtype in (torch.float32, torch.bfloat16)
    ]


@st.composite
def jobs(draw: st.DrawFn) -> JobSpec:
    """A recipe that every requested format holds."""
    name: FormatName = draw(st.sampled_from(["compressed-tensors", "gptq", "awq"]))
    if name == "awq":
        scheme = {"bits": 4, "group_size": draw(st.sampled_from([32, 64]))}
        everywhere = {"overrides": [{"match": "re:.*", **scheme}]}  # other numbers in the recipe don't matter
        recipe: dict[str, Any] = draw(st.sampled_from([scheme, {**everywhere, "bits": 8}]))
    else:
        schemes = st.fixed_dictionaries(
            {"bits": st.sampled_from([2, 3, 4, 8]), "group_size": st.sampled_from([32, 64, -1])}
        )
        overrides = draw(st.lists(st.tuples(st.sampled_from(SETS), schemes), max_size=3))
        symmetric = name == "gptq" or draw(st.booleans())
        recipe = {**draw(schemes), "symmetric": symmetric}
        recipe["overrides"] = [{"match": match, **scheme} for match, scheme in overrides]
    recipe["ignore"] = draw(st.lists(st.sampled_from([*SETS[3:], "lm_head"]), max_size=3, unique=True))
    return tiny_spec(recipe, formats=(name,))  # type: ignore[arg-type]


def random_layers(plan: Plan, seed: int) -> list[LayerResult]:
    """Random integers and scales for every quantized linear."""
    layers = []
    for layer in range(plan.steps):
        linears = plan.candidates[0].of_layer(plan.architecture, layer)
        quantized = {
            name: random_weight(
                linear.scheme, linear.out_features, linear.in_features, seed + 100 * layer + index
            )
            for index, (name, linear) in enumerate(linears.items())
            if linear.scheme is not None
        }
        layers.append(LayerResult(quantized, {}, []))
    return layers


@given(jobs(), st.integers(0, 10**6), st.integers(0, 1), st.sampled_from([10**9, 20_000]))
@settings(max_examples=25, deadline=None)
def test_what_is_read_back_is_what_was_computed(
    models: list[Checkpoint], spec: JobSpec, seed: int, model: int, shard_bytes: int
) -> None:
    source = models[model]
    plan = plan_job(spec, source.config, source.tensors)
    layers, candidate = random_layers(plan, seed), plan.candidates[0]
    with tempfile.TemporaryDirectory() as place:
        folder = FormatFolder(Path(place) / "out", spec.formats[0], source, plan, candidate)
        folder.write(layers.__getitem__, shard_bytes)
        folder.verify(layers.__getitem__)
        written = Checkpoint(folder.folder)
        for number, layer in enumerate(layers):
            weights = folder.read_weights(written, number)
            for name, weight in layer.quantized.items():
                assert torch.equal(weights[name + ".weight"], weight.dequantize())
        assert sum(tensor.size for tensor in written.tensors.values()) == candidate.output_bytes[folder.name]
        entry = json.loads((folder.folder / "config.json").read_text())["quantization_config"]
    find = {"awq": awq_transformers, "gptq": gptq_server, "compressed-tensors": ct_library}
    for linear in candidate.linears:
        if linear.name == candidate.head and folder.name == "awq":
            continue  # transformers takes no head of awq files, which a note says
        for name in (linear.name, *fused_names(linear.name, folder.name)):
            assert find[folder.name](entry, name) == linear.scheme, name
    head = find[folder.name](entry, "lm_head")
    assert head is None or folder.name == "gptq" or candidate.head is not None


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_every_architecture_in_every_format(tmp_path: Path, name: str) -> None:
    """The format's weights are those of compressed-tensors, and its size is the planned one."""
    model_type, changes = OTHER_MODELS[name]
    model = save_model(random_model(model_type, **changes), tmp_path / "model")  # type: ignore[arg-type]
    for other in ("awq", "gptq"):
        # The tiny models' low-rank projections of deepseek have 40 rows, which gptq refuses.
        ignore = ("lm_head", r"re:.*_a_proj.*") if other == "gptq" else ("lm_head",)
        recipe = Recipe(method="rtn", group_size=32, symmetric=other == "gptq", ignore=ignore)
        run = EngineRun(tiny_spec(recipe, formats=(other, "compressed-tensors")), model, tmp_path / other)
        plan, source = run.opened.plan, run.opened.checkpoint
        folders = [
            FormatFolder(run.folder(each), each, source, plan, plan.candidates[0])  # type: ignore[arg-type]
            for each in (other, "compressed-tensors")
        ]
        written = [Checkpoint(folder.folder) for folder in folders]
        for layer in range(plan.num_layers):
            first, second = (
                folder.read_weights(files, layer) for folder, files in zip(folders, written, strict=True)
            )
            assert first.keys() == second.keys()
            assert all(torch.equal(value, second[key]) for key, value in first.items())
        for folder, files in zip(folders, written, strict=True):
            size = sum(tensor.size for tensor in files.tensors.values())
            assert size == plan.candidates[0].output_bytes[folder.name]


def fused_names(name: str, format_name: str) -> list[str]:
    """The name by which vLLM asks for the linear; compressed-tensors' entry is asked by the parts' names."""
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{fused}" for fused, part in FUSED.items() if (part, format_name) == (leaf, "gptq")]
