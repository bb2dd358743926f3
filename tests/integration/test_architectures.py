"""Every architecture through the whole engine: transformers opens the files that were evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.ct_dequantizer import CompressedTensorsDequantizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from app.core.errors import RecipeUnsupported
from app.core.formats.registry import FormatName
from app.core.records.specs import Recipe, SearchSpec
from tests.tiny_models import OTHER_MODELS, EngineRun, random_model, save_model, some_tokens, tiny_spec
from workers.formats.folder import FormatFolder
from workers.modeling.checkpoint import Checkpoint

EXPERTS = ("mixtral", "qwen3-moe", "deepseek-v2", "deepseek-v3")
RECIPE = Recipe(group_size=32, search=SearchSpec(grid_points=4))


def opened(folder: Path) -> PreTrainedModel:
    """What a user of transformers gets, without any option but the dtype."""
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def dequantized(run: EngineRun, folder: Path, name: FormatName = "compressed-tensors") -> PreTrainedModel:
    """transformers' model of the original's files with the weights that our reader finds in the output."""
    plan, source = run.opened.plan, run.opened.checkpoint
    written = FormatFolder(run.folder(name), name, source, plan, plan.candidates[0])
    state = load_file(source.folder / "model.safetensors")
    for layer in range(plan.steps):
        for name, value in written.read_weights(Checkpoint(written.folder), layer).items():
            full = plan.architecture.layer_prefix(layer) + name
            assert state[full].shape == value.shape
            state[full] = value.to(state[full].dtype).contiguous()
    folder.mkdir()
    shutil.copyfile(source.folder / "config.json", folder / "config.json")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return opened(folder)


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_transformers_opens_what_was_evaluated(tmp_path: Path, name: str) -> None:
    model_type, changes = OTHER_MODELS[name]
    model = save_model(random_model(model_type, **changes), tmp_path / "model")  # type: ignore[arg-type]
    # transformers reads asymmetric linears, but of experts only symmetric ones
    recipe = RECIPE.model_copy(update={"symmetric": name in EXPERTS})
    run = EngineRun(tiny_spec(recipe), model, tmp_path / "work")
    loaded = opened(run.folder("compressed-tensors"))
    expected = dequantized(run, tmp_path / "dequantized")
    tokens = some_tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, expected(tokens).logits, rtol=1e-5, atol=1e-5)
        windows = run.texts().evaluation.tokens
        losses = [loaded(window[None], labels=window[None]).loss.double() for window in windows]
    report = run.report.candidates[0]
    assert float(torch.stack(losses).mean().exp()) == pytest.approx(report.perplexity, rel=1e-5)
    assert 0 < report.kl < 1
    linears = {entry.linear for layer in report.layers for entry in layer.linears if entry.bits == 4}
    assert linears == {name for layer in (0, 1) for name in run.opened.plan.architecture.at(layer).linears}


@pytest.mark.parametrize("name", EXPERTS)
def test_asymmetric_experts_are_read_by_compressed_tensors(tmp_path: Path, name: str) -> None:
    """Its own reader gives our weights; transformers drops the zero points of experts and must say so."""
    model_type, changes = OTHER_MODELS[name]
    model = save_model(random_model(model_type, **changes), tmp_path / "model")  # type: ignore[arg-type]
    run = EngineRun(tiny_spec(RECIPE), model, tmp_path / "work")
    folder = run.folder("compressed-tensors")
    reader = CompressedTensorsDequantizer(folder, dtype=torch.float32)
    read = reader.process(load_file(folder / "model.safetensors"))
    dequantized(run, tmp_path / "dequantized")
    expected = load_file(tmp_path / "dequantized" / "model.safetensors")
    assert read.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in read.items())
    with pytest.raises(RuntimeError):
        opened(folder)
    assert any("asymmetric experts" in note for note in run.report.notes)


def test_routers_keep_their_precision_and_loaders_are_told(tmp_path: Path) -> None:
    run = EngineRun(tiny_spec(RECIPE), save_model(random_model("mixtral"), tmp_path / "m"), tmp_path / "work")
    config = json.loads((run.folder("compressed-tensors") / "config.json").read_text())
    routers = [f"model.layers.{layer}.block_sparse_moe.gate" for layer in (0, 1)]
    loaded = [f"model.layers.{layer}.mlp.gate" for layer in (0, 1)]  # transformers' name for them
    assert config["quantization_config"]["ignore"] == ["lm_head", *routers, *loaded]
    before = load_file(run.opened.checkpoint.folder / "model.safetensors")
    after = load_file(run.folder("compressed-tensors") / "model.safetensors")
    for router in routers:
        scales = after[router + ".weight"] / before[router + ".weight"]
        torch.testing.assert_close(scales, scales[:1].expand_as(scales), rtol=1e-5, atol=0)
        assert scales.std() > 0.01


def test_loaders_are_told_of_projections_beside_the_layers(tmp_path: Path) -> None:
    model_type, changes = OTHER_MODELS["opt with gelu"]
    model = save_model(random_model(model_type, **changes), tmp_path / "model")  # type: ignore[arg-type]
    run = EngineRun(tiny_spec(RECIPE), model, tmp_path / "work")
    config = json.loads((run.folder("compressed-tensors") / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    assert {"model.decoder.project_in", "model.decoder.project_out"} <= set(ignored)
    assert not [name for name in ignored if "embed" in name]


def test_an_expert_without_tokens_is_quantized_without_scales(tmp_path: Path) -> None:
    """Of a direction and its opposite one has a positive logit, so the expert with zeros is never chosen."""
    model = random_model("mixtral", num_local_experts=4, num_experts_per_tok=1)
    with torch.no_grad():
        for layer in model.get_submodule("model.layers"):
            layer.mlp.gate.weight[0] = 0
            layer.mlp.gate.weight[2] = -layer.mlp.gate.weight[1]
    run = EngineRun(tiny_spec(RECIPE), save_model(model, tmp_path / "model"), tmp_path / "work")
    for layer in run.report.candidates[0].layers:
        entries = {entry.linear: entry for entry in layer.linears}
        unseen = entries["block_sparse_moe.experts.0.w2"]
        assert "only 0 calibration tokens" in (unseen.reason or "")
        assert (unseen.bits, unseen.scale_spread) == (4, 1.0)
        assert unseen.loss is not None
        assert 0 < unseen.loss < 100
        assert entries["block_sparse_moe.experts.0.w1"].scale_spread != 1.0
    assert any("experts saw fewer than" in note for note in run.report.notes)


def test_experts_of_a_layer_must_share_one_scheme(tmp_path: Path) -> None:
    model = save_model(random_model("mixtral"), tmp_path / "model")
    one = RECIPE.model_copy(update={"ignore": ("lm_head", "experts.1.w1")})
    with pytest.raises(RecipeUnsupported, match="servers fuse them") as refusal:
        EngineRun(tiny_spec(one), model, tmp_path / "work")
    assert "w1, w3, w2" in refusal.value.remedy


def test_linears_without_scales_are_quantized_and_say_why(tmp_path: Path) -> None:
    model = save_model(random_model("gpt_neox"), tmp_path / "model")
    report = EngineRun(tiny_spec(RECIPE), model, tmp_path / "work").report.candidates[0]
    entries = {entry.linear: entry for entry in report.layers[0].linears}
    assert entries["mlp.dense_4h_to_h"].bits == 4
    assert entries["mlp.dense_4h_to_h"].ratio is None
    assert "no layer before it can absorb them" in (entries["mlp.dense_4h_to_h"].reason or "")
    assert entries["attention.dense"].reason is None


@pytest.mark.parametrize("choice", ["nearest", "skip"])
def test_groups_that_do_not_divide(tmp_path: Path, choice: str) -> None:
    """in_features 64 and 96: groups of 64 fit attention, those of 32 all."""
    model = save_model(random_model("llama", intermediate_size=96), tmp_path / "model")
    recipe = RECIPE.model_copy(update={"group_size": 64, "indivisible": choice, "symmetric": True})
    run = EngineRun(tiny_spec(recipe), model, tmp_path / "work")
    with torch.no_grad():
        tokens = some_tokens(2, 40)
        expected = dequantized(run, tmp_path / "dequantized")(tokens).logits
        loaded = opened(run.folder("compressed-tensors"))(tokens).logits
    torch.testing.assert_close(loaded, expected, rtol=1e-5, atol=1e-5)
    for layer in run.report.candidates[0].layers:
        down = next(entry for entry in layer.linears if entry.linear == "mlp.down_proj")
        assert (down.bits, down.group_size) == ((4, 32) if choice == "nearest" else (None, None))
        assert "in_features=96 is not a multiple of group_size=64" in (down.reason or "")
        assert all(entry.group_size == 64 for entry in layer.linears if entry is not down)


def test_buffers_of_old_checkpoints_are_copied_and_not_judged(tmp_path: Path) -> None:
    """GPT-NeoX files of the past hold a mask value that is infinite in half precision."""
    folder = save_model(random_model("gpt_neox"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for layer in (0, 1):
        prefix = f"gpt_neox.layers.{layer}.attention."
        tensors[prefix + "masked_bias"] = torch.tensor(-torch.inf, dtype=torch.float16)
        tensors[prefix + "bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run = EngineRun(tiny_spec(RECIPE), folder, tmp_path / "work")
    written = load_file(run.folder("compressed-tensors") / "model.safetensors")
    assert torch.isinf(written["gpt_neox.layers.1.attention.masked_bias"])
    config = json.loads((run.folder("compressed-tensors") / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head", "embed_out"]
