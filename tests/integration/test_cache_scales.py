"""Scales of an FP8 cache, from calibration to files, report, server and other loaders."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from app.core.child.assignment import CHECKPOINTS, Noted
from app.core.records.specs import CalibrationSpec, EvaluationSpec, Recipe, SearchSpec, TargetSpec
from tests.families_in_memory import family_model
from tests.inference import Served, greedy
from tests.tiny_models import TEXTS, TOKENIZER, EngineRun, random_model, save_model, some_text, tiny_spec
from workers.quantization.calibration import CalibrationPass
from workers.quantization.folding import Heads
from workers.quantization.layer import LayerTask, quantize_layer
from workers.serving.loading import LoadRequest, load_model

FEW = SearchSpec(grid_points=3, epochs=1)
RECIPES = (
    Recipe(method="rtn"),
    Recipe(method="rtn", kv_cache="fp8"),
    Recipe(method="awq", kv_cache="fp8", search=FEW),
    Recipe(method="gptq", kv_cache="fp8"),
    Recipe(method="rtn", scheme="fp8", kv_cache="fp8"),
)
PLAIN, CACHED, SCALED = 0, 1, 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> EngineRun:
    """The bundled model, whose query heads share keys and values."""
    evaluation = EvaluationSpec(texts=(some_text("test") * 4,), num_samples=16, sequence_length=128)
    return EngineRun(tiny_spec(RECIPES, evaluation=evaluation), TOKENIZER, tmp_path_factory.mktemp("cache"))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def perplexity(model: torch.nn.Module, windows: Tensor) -> float:
    with torch.no_grad():
        logarithms = torch.log_softmax(model(windows).logits[:, :-1].double(), dim=-1)
    return math.exp(-logarithms.gather(2, windows[:, 1:, None]).mean())


def test_the_files_hold_the_range_that_the_calibration_text_gives(run: EngineRun) -> None:
    """The slow truth: transformers' cache after each window."""
    model = AutoModelForCausalLM.from_pretrained(TOKENIZER, dtype=torch.float32)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(run.texts().calibration.tokens, cache=cache)
    stored = tensors_of(run.folder("compressed-tensors", CACHED))
    for layer, kept in enumerate(cache.layers):
        for name, states in (("k_scale", kept.keys), ("v_scale", kept.values)):
            scale = stored[f"model.layers.{layer}.self_attn.{name}"]
            assert (scale.shape, scale.dtype) == ((1,), torch.bfloat16)
            assert scale.item() == pytest.approx(float(states.abs().amax()) / 448, rel=2**-8)


def test_the_report_states_the_scales_and_what_the_cache_costs(run: EngineRun) -> None:
    report = run.report
    plain, cached = report.candidates[PLAIN], report.candidates[CACHED]
    assert cached.label == f"{plain.label} kv fp8"
    assert plain.cache is None
    assert cached.cache is not None
    stored = tensors_of(run.folder("compressed-tensors", CACHED))
    keys = [float(value) for name, value in stored.items() if name.endswith("k_scale")]
    assert (cached.cache.layers, cached.cache.key_scales) == (6, (min(keys), max(keys)))
    assert [layer.cache_scales.key for layer in cached.layers if layer.cache_scales] == keys
    assert plain.kl is not None
    assert cached.kl is not None
    assert plain.kl < cached.kl < 2 * plain.kl  # measured: 0.00448 and 0.00509
    assert all(layer.cache_scales is None for layer in plain.layers)


def test_candidates_without_a_cache_are_as_they_were(run: EngineRun) -> None:
    plain, cached = (tensors_of(run.folder("compressed-tensors", index)) for index in (PLAIN, CACHED))
    scales = {f"model.layers.{n}.self_attn.{name}" for n in range(6) for name in ("k_scale", "v_scale")}
    assert cached.keys() - plain.keys() == scales
    assert all(torch.equal(value, cached[name]) for name, value in plain.items())
    sizes = [each.output_bytes["compressed-tensors"] for each in run.opened.plan.candidates]
    assert sizes[CACHED] - sizes[PLAIN] == sum(cached[name].nbytes for name in scales)


@pytest.mark.parametrize("index", range(len(RECIPES)))
def test_our_server_computes_what_the_report_says(run: EngineRun, index: int) -> None:
    loaded = load_model(
        LoadRequest(run.folder("compressed-tensors", index), torch.device("cpu"), torch.float32)
    )
    found = perplexity(loaded.model, run.texts().evaluation.tokens)
    assert found == pytest.approx(run.report.candidates[index].perplexity, rel=1e-3)


def test_our_server_answers_from_its_cache_as_without_one(run: EngineRun) -> None:
    """Greedy tokens of rows that advance together are those of whole passes; the native call can't round."""
    folder = run.folder("compressed-tensors", CACHED)
    served = Served(folder, dtype=torch.float32)
    assert not served.native
    prompts = run.texts().evaluation.tokens[:3, :40].tolist()
    answers = served.generate([greedy(prompt, 12) for prompt in prompts])
    model = load_model(LoadRequest(folder, torch.device("cpu"), torch.float32)).model
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = list(prompt)
        for _ in answer:
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        assert answer == tokens[len(prompt) :]


def test_transformers_opens_the_files_and_leaves_the_cache_as_it_is(run: EngineRun) -> None:
    """Its attentions take `cache`; compressed-tensors 0.20 looks for `past_key_values` and finds none."""
    models = [
        AutoModelForCausalLM.from_pretrained(run.folder("compressed-tensors", index), dtype=torch.float32)
        for index in (PLAIN, CACHED)
    ]
    windows = run.texts().evaluation.tokens
    plain, cached = (perplexity(model, windows) for model in models)
    assert cached == plain
    assert plain == pytest.approx(run.report.candidates[PLAIN].perplexity, rel=1e-3)


def folded_layer(run: EngineRun, layer: int) -> tuple[dict[str, Tensor], Any, CalibrationPass]:
    """The scales that AWQ gives a layer, its folded weights, and a pass that stands before it."""
    work = run.opened
    own = CalibrationPass(work.decoder(), work.batches(run.texts().calibration))
    own.sees_caches = True
    while own.layer < layer:
        own.skip()
    weights = work.full_precision(own.decoder.layer_weights(layer))
    before = list(own.states)
    statistics = own.collect(weights)
    candidate = work.plan.candidates[SCALED]
    linears = candidate.of_layer(work.plan.architecture, layer)
    task = LayerTask(
        work.plan.architecture.at(layer), candidate.recipe,
        {name: each.scheme for name, each in linears.items() if each.scheme},
        Heads.of(work.checkpoint.config), weights, statistics.groups, torch.float32, cache=statistics.cache,
    )  # fmt: skip
    result, folded = quantize_layer(task)
    own.layer, own.states = layer, before
    return result.dense, folded, own


def test_values_are_measured_after_their_scales_are_folded_in(run: EngineRun) -> None:
    """AWQ divides rows of v by the scales of o: the folded layer, run again, gives the range of the files."""
    dense, folded, own = folded_layer(run, 5)
    unscaled = own.decoder.layer_weights(5)["self_attn.v_proj.weight"].float()
    own.observe(folded)
    assert own.cache_range is not None
    for name, sizes in (("k_scale", own.cache_range.key), ("v_scale", own.cache_range.value)):
        assert dense[f"self_attn.{name}"].item() == pytest.approx(float(sizes.amax()) / 448, rel=1e-4)
    assert not torch.equal(folded["self_attn.v_proj.weight"], unscaled)


def test_a_resumed_job_writes_the_same_scales(run: EngineRun, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(run.work / CHECKPOINTS, work / CHECKPOINTS)
    for file in (work / CHECKPOINTS).glob("layer-0000[345]-*"):
        file.unlink()
    resumed = EngineRun(run.opened.spec, TOKENIZER, work)
    assert resumed.report.resumed_at_layer == 3
    for index in range(len(RECIPES)):
        first, second = (tensors_of(each.folder("compressed-tensors", index)) for each in (run, resumed))
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert resumed.report.candidates[CACHED].cache == run.report.candidates[CACHED].cache


HYBRIDS = ("qwen3_next", "olmo_hybrid")


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_layers_with_states_of_one_size_get_no_scales(model_type: str, tmp_path: Path) -> None:
    model = save_model(family_model(model_type, vocab_size=4096), tmp_path / "model")
    recipes = tuple(Recipe(method="rtn", group_size=32, kv_cache=numbers) for numbers in (None, "fp8"))
    run = EngineRun(tiny_spec(recipes), model, tmp_path / "work")
    kinds = json.loads((model / "config.json").read_text())["layer_types"]
    attentions = {index for index, kind in enumerate(kinds) if kind == "full_attention"}
    assert 0 < len(attentions) < len(kinds)
    plain, cached = run.report.candidates
    assert {layer.layer for layer in cached.layers if layer.cache_scales is not None} == attentions
    notes = [message.message for message in run.messages if isinstance(message, Noted)]
    skipped = f"recipe 1: {len(kinds) - len(attentions)} of {len(kinds)} layers keep a state of one size"
    assert any(note.startswith(skipped) for note in notes)
    stored = tensors_of(run.folder("compressed-tensors", 1))
    names = {
        f"model.layers.{layer}.self_attn.{name}" for layer in attentions for name in ("k_scale", "v_scale")
    }
    assert {name for name in stored if name.endswith(("k_scale", "v_scale"))} == names
    assert plain.kl != cached.kl
    loaded = load_model(LoadRequest(run.folder("compressed-tensors", 1), torch.device("cpu"), torch.float32))
    assert perplexity(loaded.model, run.texts().evaluation.tokens) == pytest.approx(
        cached.perplexity, rel=1e-3
    )


def planted(model: PreTrainedModel) -> PreTrainedModel:
    """The layers hand far larger keys than values to their caches."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight *= 30
    return model


@pytest.mark.parametrize(
    "changed",
    [
        lambda: random_model("llama", torch.float16),
        lambda: planted(random_model("qwen2")),
        lambda: random_model("phi3"),
        lambda: random_model("gemma2", query_pre_attn_scalar=16, head_dim=16),
    ],
    ids=["float16", "large keys", "joined", "gemma2"],
)
def test_other_models(changed: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = save_model(changed(), tmp_path / "model")
    recipe = Recipe(group_size=32, kv_cache="fp8", search=FEW)
    run = EngineRun(tiny_spec(recipe), model, tmp_path / "work")
    (candidate,) = run.report.candidates
    assert candidate.cache is not None
    assert candidate.cache.layers == 2
    loaded = load_model(LoadRequest(run.folder("compressed-tensors"), torch.device("cpu"), torch.float32))
    found = perplexity(loaded.model, run.texts().evaluation.tokens)
    assert found == pytest.approx(candidate.perplexity, rel=2e-3)


def test_scales_that_the_original_has_are_replaced(tmp_path: Path) -> None:
    model = save_model(random_model("llama"), tmp_path / "model")
    file = model / "model.safetensors"
    names = [
        f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("k_scale", "v_scale")
    ]
    save_file(
        {**load_file(file), **{name: torch.tensor([9.0]) for name in names[:3]}}, file, {"format": "pt"}
    )
    recipes = tuple(Recipe(method="rtn", group_size=32, kv_cache=numbers) for numbers in (None, "fp8"))
    run = EngineRun(tiny_spec(recipes), model, tmp_path / "work")
    plain, cached = (tensors_of(run.folder("compressed-tensors", index)) for index in range(2))
    assert [float(plain[name]) for name in names[:3]] == [9.0, 9.0, 9.0]
    assert [scales.key for layer in run.report.candidates[1].layers if (scales := layer.cache_scales)] == [
        float(cached[name]) for name in names[::2]
    ]
    assert all(0 < float(cached[name]) < 1 for name in names)


def test_a_ladder_and_omniquant_have_scales_too(tmp_path: Path) -> None:
    """Further recipes on the way to a target take the ranges from the statistics of the layers."""
    model = save_model(random_model("llama"), tmp_path / "model")
    recipe = Recipe(method="rtn", bits=2, group_size=32, kv_cache="fp8", search=FEW)
    omniquant = Recipe(method="omniquant", bits=2, group_size=32, kv_cache="fp8", search=FEW)
    target = TargetSpec(max_kl=1e-9, on_miss="publish")
    run = EngineRun(tiny_spec((recipe, omniquant), target=target), model, tmp_path / "work")
    assert len(run.report.candidates) > 2
    for candidate in run.report.candidates:
        assert candidate.recipe.kv_cache == "fp8"
        assert candidate.cache is not None
        assert candidate.cache.layers == 2


def test_two_devices_see_the_range_of_both(tmp_path: Path) -> None:
    """Each passes its share of the batches; the first takes the largest of both."""
    model = save_model(random_model("llama"), tmp_path / "model")
    text = (TEXTS / "valid.txt").read_text("utf-8")[:60000]
    calibration = CalibrationSpec(texts=(text,), num_samples=40, sequence_length=256)  # two batches
    spec = tiny_spec(Recipe(method="rtn", group_size=32, kv_cache="fp8"), calibration=calibration)
    alone = EngineRun(spec, model, tmp_path / "one", threads=1)
    shared = EngineRun(spec, model, tmp_path / "two", threads=1, calibration_devices=["cpu"])
    assert any(isinstance(each, Noted) and each.code == "devices" for each in shared.messages)
    (one,), (two,) = alone.report.candidates, shared.report.candidates
    assert one.cache == two.cache
    assert one.cache is not None
