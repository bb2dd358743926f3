"""The engine's files, judged by code that is not ours: transformers and compressed-tensors read them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.entrypoints.convert.converters.ct_dequantizer import CompressedTensorsDequantizer
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from app.core.child import assignment
from app.core.jobs.report import Quality
from app.core.records.specs import Override, Recipe, SearchSpec
from kernels.layouts import packed_words
from tests.tiny_models import (
    MODEL_TYPES,
    OTHER_MODELS,
    EngineRun,
    random_model,
    save_model,
    some_tokens,
    tiny_spec,
)
from workers.formats.folder import FormatFolder
from workers.modeling.checkpoint import Checkpoint

SEARCH = SearchSpec(grid_points=4)


def recipe(**changes: object) -> Recipe:
    return Recipe.model_validate({"group_size": 32, "search": SEARCH, **changes})


EIGHT = Override(match="down_proj", bits=8, group_size=64)
THREE = Override(match=r"re:.*[.]1[.]mlp[.](gate|up)_proj", bits=3)
WHOLE = Override(match="o_proj", group_size=-1)
MIXED = (EIGHT, THREE, WHOLE)

# name: (model type, changes of the model, recipe)
CASES = {
    "llama w4 g32": ("llama", {}, recipe()),
    "mistral w4 g64": ("mistral", {"sliding_window": 16}, recipe(group_size=64)),
    "qwen2 w4 g32": ("qwen2", {}, recipe()),
    "qwen3 w4 g32 tied": ("qwen3", {"tie_word_embeddings": True}, recipe()),
    "llama w4 sym": ("llama", {"attention_bias": True, "mlp_bias": True}, recipe(symmetric=True)),
    "mistral w4 channel": ("mistral", {}, recipe(group_size=-1)),
    "qwen2 w4 channel sym": ("qwen2", {}, recipe(group_size=-1, symmetric=True)),
    "qwen3 w8": ("qwen3", {"head_dim": 32}, recipe(bits=8)),
    "llama w8 sym tied": ("llama", {"tie_word_embeddings": True}, recipe(bits=8, symmetric=True)),
    "mistral w3": ("mistral", {}, recipe(bits=3)),
    "qwen2 w3 sym": ("qwen2", {}, recipe(bits=3, symmetric=True)),
    "llama w2": ("llama", {}, recipe(bits=2)),
    "llama gptq w3": ("llama", {}, recipe(method="gptq", bits=3)),
    "qwen3 awq+gptq w4": ("qwen3", {}, recipe(rounding="gptq")),
    "llama kept linears": ("llama", {}, recipe(ignore=("down_proj", "re:.*[.]1[.]self_attn[.].*"))),
    "llama mixed sym": ("llama", {}, recipe(symmetric=True, overrides=(EIGHT,))),
    "qwen3 four schemes sym": ("qwen3", {}, recipe(symmetric=True, bits=2, overrides=MIXED)),
}  # fmt: skip


def engine_run(folder: Path, name: str, **changes: object) -> EngineRun:
    model_type, model_changes, chosen = CASES[name]
    model = save_model(random_model(model_type, **model_changes), folder / "model")  # type: ignore[arg-type]
    return EngineRun(tiny_spec(chosen, **changes), model, folder / "work")


def opened(folder: Path) -> PreTrainedModel:
    """What a user of transformers gets, without any option but the dtype."""
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def dequantized_model(run: EngineRun, format_name: str) -> PreTrainedModel:
    """transformers' model of the original with the weights that our reader finds in the files."""
    plan = run.opened.plan
    folder = FormatFolder(
        run.folder(format_name), format_name, run.opened.checkpoint, plan, plan.candidates[0]  # type: ignore[arg-type]
    )  # fmt: skip
    written = Checkpoint(folder.folder)
    state = {
        plan.architecture.layer_prefix(layer) + name: value.float()
        for layer in range(plan.steps)
        for name, value in folder.read_weights(written, layer).items()
    }
    model = opened(run.opened.checkpoint.folder)
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    return model


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    losses = [model(window[None], labels=window[None]).loss.double() for window in windows]
    return float(torch.stack(losses).mean().exp())


@pytest.mark.parametrize("name", CASES)
def test_transformers_opens_what_was_evaluated(tmp_path: Path, name: str) -> None:
    run = engine_run(tmp_path, name)
    loaded = opened(run.folder("compressed-tensors"))
    expected = dequantized_model(run, "compressed-tensors")
    assert_same_logits(loaded, expected)
    report = run.report
    windows = run.texts().evaluation.tokens
    assert perplexity(loaded, windows) == pytest.approx(report.candidates[0].perplexity, rel=1e-5)
    original = perplexity(opened(run.opened.checkpoint.folder), windows)
    assert original == pytest.approx(report.original.perplexity, rel=1e-5)
    ratio = report.candidates[0].perplexity / report.original.perplexity
    assert report.candidates[0].perplexity_ratio == pytest.approx(ratio)
    assert_compared(report.candidates[0], opened(run.opened.checkpoint.folder), loaded, windows)


@torch.no_grad()
def assert_compared(
    figures: Quality, original: PreTrainedModel, loaded: PreTrainedModel, windows: Tensor
) -> None:
    """KL, its percentile and the agreement of the likeliest tokens, by transformers' logits in float64."""
    first, second = (model(windows).logits[:, :-1].double().log_softmax(-1) for model in (original, loaded))
    kl = (first.exp() * (first - second)).sum(-1)
    assert figures.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    percentile = np.quantile(kl.numpy(), 0.99, method="inverted_cdf")
    assert figures.kl_p99 == pytest.approx(float(percentile), rel=2e-3)
    agrees = first.argmax(-1) == second.argmax(-1)
    nearly = 1 / agrees.numel()  # two logits may be equal but for float32's rounding
    assert figures.top1_agreement == pytest.approx(float(agrees.double().mean()), abs=nearly)
    assert figures.kl_interval is not None
    assert figures.kl_interval.low < figures.kl < figures.kl_interval.high


SEVERAL = {
    "both": (EIGHT,),
    "bits": (Override(match="down_proj", bits=8),),
    "groups": (Override(match="down_proj", group_size=64),),
    "four schemes": MIXED,
}


def compress_with_packed_zero_points(
    compress: Callable[..., dict[str, Tensor]],
) -> Callable[..., dict[str, Tensor]]:
    """compressed-tensors' `compress` without its fault: for modules without weights it leaves the zero points
    at one integer per group and row, where files have them packed."""

    def fixed(state: dict[str, Tensor], scheme: QuantizationScheme) -> dict[str, Tensor]:
        compressed = compress(state, scheme)
        if state["weight"].is_meta and "weight_zero_point" in compressed:
            assert scheme.weights is not None
            rows, *groups = state["weight_zero_point"].shape
            packed = (packed_words(rows, scheme.weights.num_bits), *groups)
            compressed["weight_zero_point"] = torch.empty(packed, dtype=torch.int32, device="meta")
        return compressed

    return fixed


@pytest.mark.parametrize("overrides", SEVERAL.values(), ids=SEVERAL)
def test_several_asymmetric_schemes(
    tmp_path: Path, overrides: tuple[Override, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """compressed-tensors reads them; transformers can't, and must say so instead of giving other weights."""
    model = save_model(random_model("llama"), tmp_path / "model")
    run = EngineRun(tiny_spec(recipe(overrides=overrides)), model, tmp_path / "work")
    folder = run.folder("compressed-tensors")
    reader = CompressedTensorsDequantizer(folder, dtype=torch.float32)
    read = reader.process(load_file(folder / "model.safetensors"))
    dense = dequantized_model(run, "compressed-tensors")
    expected = dense.state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in read.items())
    with pytest.raises(RuntimeError):
        opened(folder)
    assert any("several asymmetric schemes" in note for note in run.report.notes)
    compress = PackedQuantizationCompressor.compress
    monkeypatch.setattr(PackedQuantizationCompressor, "compress", compress_with_packed_zero_points(compress))
    assert_same_logits(opened(folder), dense)


@pytest.mark.parametrize("overrides", [{"bits": 8}, {"bits": 2}, {"group_size": 64}])
def test_experts_of_several_schemes(tmp_path: Path, overrides: dict[str, int]) -> None:
    """transformers reads all experts by one scheme: it must refuse the files, never give other weights."""
    model_type, changes = OTHER_MODELS["mixtral"]
    model = save_model(random_model(model_type, **changes), tmp_path / "model")  # type: ignore[arg-type]
    other = Override.model_validate({"match": r"re:.*layers[.]1[.].*experts.*", **overrides})
    run = EngineRun(tiny_spec(recipe(symmetric=True, overrides=(other,))), model, tmp_path / "work")
    assert any("experts have several schemes" in note for note in run.report.notes)
    with pytest.raises(RuntimeError):
        opened(run.folder("compressed-tensors"))


def assert_same_logits(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    tokens = some_tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, rtol=1e-5, atol=1e-5)


GPTQ_CASES = {
    "llama w4": ("llama", recipe(symmetric=True)),
    "mistral w3 channel": ("mistral", recipe(symmetric=True, bits=3, group_size=-1)),
    "qwen2 w8 bf16": ("qwen2", recipe(symmetric=True, bits=8)),
    "qwen3 w2 mixed": ("qwen3", recipe(symmetric=True, bits=2, ignore=("o_proj",), overrides=(EIGHT, THREE))),
}


@pytest.mark.parametrize("name", GPTQ_CASES)
def test_gptq_files_hold_the_weights_of_the_compressed_tensors_files(tmp_path: Path, name: str) -> None:
    """What transformers computes with the compressed-tensors files is what is in the GPTQ files."""
    model_type, chosen = GPTQ_CASES[name]
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    model = save_model(random_model(model_type, dtype), tmp_path / "model")
    spec = tiny_spec(chosen, formats=("gptq", "compressed-tensors"))
    run = EngineRun(spec, model, tmp_path / "work")
    gptq, own = (dequantized_model(run, name) for name in spec.formats)
    for key, value in gptq.state_dict().items():
        assert torch.equal(value, own.state_dict()[key]), key
    if dtype == torch.float32:  # else compressed-tensors rounds products to the dtype of the scales
        assert_same_logits(opened(run.folder("compressed-tensors")), gptq)


@pytest.mark.parametrize("name", ["llama w4 g32", "qwen2 w4 g32", "mistral w4 g64", "qwen3 w4 g32 tied"])
def test_awq_files_hold_the_weights_of_the_compressed_tensors_files(tmp_path: Path, name: str) -> None:
    """compressed-tensors' own converter reads the AWQ folder; both give the same weights, bit for bit."""
    run = engine_run(tmp_path, name, formats=("awq", "compressed-tensors"))
    converter = AutoAWQConverter.from_pretrained(str(run.folder("awq")))
    stored = load_file(run.folder("awq") / "model.safetensors")
    converter.validate(dict(stored))
    converted = converter.process(stored)
    own = load_file(run.folder("compressed-tensors") / "model.safetensors")
    assert converted.keys() == own.keys()
    scheme = next(iter(converter.update_config(None).config_groups.values()))
    linears = [key.removesuffix(".weight_packed") for key in own if key.endswith(".weight_packed")]
    assert len(linears) == 14
    for linear in linears:
        weights = []
        for tensors in (converted, own):
            parts = {n: tensors.pop(f"{linear}.{n}") for n in (
                "weight_packed", "weight_scale", "weight_shape", "weight_zero_point",
            )}  # fmt: skip
            parts["weight_scale"] = parts["weight_scale"].float()
            weights.append(PackedQuantizationCompressor.decompress(parts, scheme)["weight"])
        assert torch.equal(*weights)
    for key, value in own.items():
        assert torch.equal(value, converted[key])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_lose_only_their_own_rounding(
    tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    """compressed-tensors multiplies in the scales' dtype: exactly our weights, rounded to it."""
    model = save_model(random_model(model_type, dtype), tmp_path / "model")
    run = EngineRun(tiny_spec(recipe()), model, tmp_path / "work")
    loaded = dict(opened(run.folder("compressed-tensors")).named_parameters())
    expected = dict(dequantized_model(run, "compressed-tensors").named_parameters())
    for name, value in expected.items():
        assert torch.equal(loaded[name], value.to(dtype).float()), name


def test_several_shards_are_one_model(tmp_path: Path) -> None:
    run = engine_run(tmp_path, "qwen2 w4 g32")
    whole = run.folder("compressed-tensors")
    sharded = EngineRun(
        run.opened.spec, run.opened.checkpoint.folder, tmp_path / "again", shard_bytes=100_000
    ).folder("compressed-tensors")
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert not (sharded / "model.safetensors").exists()
    merged = {name: value for file in files for name, value in load_file(file).items()}
    single = load_file(whole / "model.safetensors")
    assert merged.keys() == single.keys()
    assert all(torch.equal(value, single[name]) for name, value in merged.items())
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == merged.keys()
    tokens = some_tokens(1)
    with torch.no_grad():
        assert torch.equal(opened(sharded)(tokens).logits, opened(whole)(tokens).logits)


def test_a_sharded_model_is_quantized_as_a_whole_one(tmp_path: Path) -> None:
    model = random_model("llama")
    whole = EngineRun(tiny_spec(recipe()), save_model(model, tmp_path / "one"), tmp_path / "work-one")
    parts = save_model(model, tmp_path / "many", max_shard_size="200KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    again = EngineRun(tiny_spec(recipe()), parts, tmp_path / "work-many")
    first, second = (
        load_file(run.folder("compressed-tensors") / "model.safetensors") for run in (whole, again)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("format_name", ["awq", "compressed-tensors"])
def test_tokenizer_template_and_generation_are_in_the_folder(tmp_path: Path, format_name: str) -> None:
    folder = engine_run(tmp_path, "llama w4 g32", formats=(format_name,)).folder(format_name)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer("a river")["input_ids"]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n"
    assert (folder / "generation_config.json").exists()


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    run = engine_run(tmp_path, "qwen3 w4 g32 tied")
    again = EngineRun(run.opened.spec, run.opened.checkpoint.folder, tmp_path / "again")
    files = [
        {file.name: file.read_bytes() for file in each.folder("compressed-tensors").iterdir()}
        for each in (run, again)
    ]
    assert files[0] == files[1]


def test_a_run_resumes_after_its_finished_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = engine_run(tmp_path, "llama w4 g32")
    kept = tmp_path / "resumed" / "checkpoints"
    kept.mkdir(parents=True)
    first = "layer-00000-recipe-00.safetensors"
    (kept / first).write_bytes((run.work / "checkpoints" / first).read_bytes())
    again = EngineRun(run.opened.spec, run.opened.checkpoint.folder, tmp_path / "resumed")
    assert again.report.resumed_at_layer == 1
    assert "1 of 2 layers were finished before" in again.report.notes
    assert again.report.histograms == run.report.histograms
    names = ("compressed-tensors", "model.safetensors")
    assert (again.folder(names[0]) / names[1]).read_bytes() == (run.folder(names[0]) / names[1]).read_bytes()
    figures = set(Quality.model_fields)
    assert again.report.candidates[0].model_dump(include=figures) == run.report.candidates[0].model_dump(
        include=figures
    )
    assert [layer.linears for layer in again.report.candidates[0].layers] == [
        layer.linears for layer in run.report.candidates[0].layers
    ]
    monkeypatch.setattr(assignment, "version", lambda name: "0.0.0")  # layers of two versions are not mixed
    anew = EngineRun(run.opened.spec, run.opened.checkpoint.folder, tmp_path / "resumed")
    assert anew.report.resumed_at_layer == 0


def test_each_candidate_is_reported_on_its_own(tmp_path: Path) -> None:
    model = save_model(random_model("llama"), tmp_path / "model")
    recipes = (recipe(bits=8, method="rtn"), recipe(bits=2, method="rtn"))
    report = EngineRun(tiny_spec(recipes), model, tmp_path / "work").report
    eight, two = report.candidates
    assert (eight.label, two.label) == ("rtn w8 g32", "rtn w2 g32")
    assert eight.kl < 0.01 < two.kl
    assert abs(math.log(eight.perplexity_ratio)) < abs(math.log(two.perplexity_ratio))
    assert eight.bytes["compressed-tensors"] > two.bytes["compressed-tensors"]
    assert eight.gain_over_rounding == two.gain_over_rounding == 0
    assert len(report.histograms) == 14
    assert all({"p0.1", "p50", "p99.9"} <= entry.percentiles.keys() for entry in report.histograms)
    assert all(len(layer.linears) == 7 for candidate in report.candidates for layer in candidate.layers)
