"""Bad inputs through the engine: each ends with its own code, and nothing is left to publish."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.core.child.assignment import OUTPUT, Noted, ProgressMessage, StageStarted
from app.core.errors import ModelRefused, NibbleError, TargetMissed
from app.core.jobs.report import Report
from app.core.records.job import Stage
from app.core.records.specs import CalibrationSpec, EvaluationSpec, Recipe, TargetSpec
from kernels import fallbacks
from tests.tiny_models import EngineRun, assignment, some_text, tiny_model, tiny_spec
from workers.child.job_run import run_job

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS)

    return edit


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def truncate(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[: len(content) // 2])


def shrink_vocabulary(model: Path) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    edit_weights(lambda tensors: tensors.update({n: tensors[n][:100].clone() for n in names}))(model)
    edit_config(vocab_size=100)(model)


def overwrite(name: str, content: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_text(content) and None


def set_weight(name: str, value: float) -> Callable[[Path], None]:
    return edit_weights(lambda tensors: tensors[name].view(-1)[7].fill_(value))


def asked(**changes: object) -> dict[str, object]:
    return changes


BAD_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "NaN in a linear": (set_weight(UP, float("nan")), "weights_not_finite"),
    "infinity in a norm": (set_weight("model.norm.weight", float("inf")), "weights_not_finite"),
    "NaN in the embedding": (set_weight("model.embed_tokens.weight", float("nan")), "weights_not_finite"),
    "activations that overflow": (
        edit_weights(lambda tensors: tensors["model.layers.0.input_layernorm.weight"].fill_(1e30)),
        "activations_not_finite",
    ),
    "weights beyond float16": (
        set_weight("model.layers.0.self_attn.q_proj.weight", 1e8), "weights_overflow",
    ),
    "a missing linear": (edit_weights(lambda tensors: tensors.pop(UP)), "weights_missing"),
    "a missing head": (edit_weights(lambda tensors: tensors.pop("lm_head.weight")), "weights_missing"),
    "a missing norm": (edit_weights(lambda tensors: tensors.pop("model.norm.weight")), "weights_missing"),
    "a config of another width": (edit_config(hidden_size=128, head_dim=16), "weights_mismatch"),
    "a config that makes no model": (edit_config(hidden_act="nope"), "config_invalid"),
    "a config with the wrong type": (edit_config(num_attention_heads="4"), "config_invalid"),
    "a truncated file": (truncate, "model_header_invalid"),
    "an unknown architecture": (
        edit_config(model_type="no_such", architectures=["NoSuchForCausalLM"]), "architecture_unsupported",
    ),
    "a kind of quantized model that is not read": (
        edit_config(quantization_config={"quant_method": "bitsandbytes"}), "already_quantized",
    ),
    "plain weights that are said to be quantized": (
        edit_config(quantization_config={"quant_method": "gptq"}), "quantized_source_invalid",
    ),
    "no layers": (edit_config(num_hidden_layers=0), "config_invalid"),
    "a broken tokenizer": (overwrite("tokenizer.json", "{}"), "tokenizer_invalid"),
    "a tokenizer of another model": (shrink_vocabulary, "tokenizer_mismatch"),
}  # fmt: skip
TEXT = (some_text("valid")[:500],)
BAD_SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "too little calibration text": (
        asked(calibration=CalibrationSpec(texts=TEXT, num_samples=100, sequence_length=32)), "text_too_short",
    ),
    "too little evaluation text": (asked(evaluation=EvaluationSpec(texts=TEXT)), "text_too_short"),
    "empty text": (
        asked(calibration=CalibrationSpec(texts=("  ",), num_samples=1, sequence_length=8)), "text_empty",
    ),
    "an unknown text": (asked(evaluation=EvaluationSpec(dataset="builtin:pile")), "dataset_not_found"),
    "groups that do not divide": (asked(recipe=Recipe(group_size=128)), "group_size_indivisible"),
    "3 bits in the format awq": (
        asked(recipe=Recipe(group_size=32, bits=3), formats=("awq",)), "format_cannot_hold_recipe",
    ),
    "nothing to quantize": (
        asked(recipe=Recipe(group_size=32, ignore=("re:.*",))), "nothing_to_quantize",
    ),
}  # fmt: skip


def run(model: Path, work: Path, **changes: object) -> None:
    run_job(assignment(tiny_spec(**changes), model, work), lambda _: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("damage", "code"), BAD_MODELS.values(), ids=list(BAD_MODELS))
def test_bad_models(tmp_path: Path, damage: Callable[[Path], None], code: str) -> None:
    model = tiny_model(tmp_path / "model")
    damage(model)
    with pytest.raises(NibbleError) as refusal:
        run(model, tmp_path / "work")
    assert refusal.value.code == code
    assert refusal.value.message
    assert refusal.value.remedy
    assert not (tmp_path / "work" / OUTPUT / "report.json").exists()


def test_a_refusal_of_one_linear_names_its_layer(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    set_weight("model.layers.1.mlp.down_proj.weight", 1e8)(model)
    with pytest.raises(
        NibbleError, match=r"^recipe 0, layer 1: mlp\.down_proj: weights up to 1e\+08"
    ) as refusal:
        run(model, tmp_path / "work")
    assert "let `ignore` match mlp.down_proj of this layer" in refusal.value.remedy


def test_broken_weights_are_found_before_the_work(tmp_path: Path) -> None:
    """Of the last layer of a large model, too: it is reached hours later."""
    model = tiny_model(tmp_path / "model")
    set_weight(UP, float("nan"))(model)
    said: list[ProgressMessage] = []
    with pytest.raises(ModelRefused, match="NaN or infinite"):
        run_job(assignment(tiny_spec(), model, tmp_path / "work"), said.append)
    assert {message.stage for message in said if isinstance(message, StageStarted)} == {Stage.FETCHING}


@pytest.mark.parametrize(("changes", "code"), BAD_SPECS.values(), ids=list(BAD_SPECS))
def test_bad_requests(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    model = tiny_model(tmp_path / "model")
    with pytest.raises(NibbleError) as refusal:
        run(model, tmp_path / "work", **changes)
    assert refusal.value.code == code
    assert refusal.value.remedy


RECIPES = (
    Recipe(group_size=32, bits=8, method="rtn"),
    Recipe(group_size=32, bits=2, method="rtn"),
)


def ratios(report: Report) -> list[float]:
    return [candidate.perplexity_ratio for candidate in report.candidates]


def test_a_target_chooses_the_candidates_that_meet_it(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    free = EngineRun(tiny_spec(RECIPES), model, tmp_path / "free")
    assert [output.recipe_index for output in free.finished.outputs] == [0, 1]
    assert [candidate.meets_target for candidate in free.report.candidates] == [None, None]
    limits = sorted(ratios(free.report))
    target = TargetSpec(max_perplexity_ratio=sum(limits) / 2)
    chosen = EngineRun(tiny_spec(RECIPES, target=target), model, tmp_path / "chosen")
    better = ratios(free.report).index(limits[0])
    assert [output.recipe_index for output in chosen.finished.outputs] == [better]
    assert [candidate.meets_target for candidate in chosen.report.candidates] == [
        index == better for index in range(2)
    ]


def test_a_missed_target_is_told_with_the_best_candidate(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    with pytest.raises(TargetMissed, match=r"candidate \(\w+ w\d g32\).* at most 0\.01 times was"):
        run(model, tmp_path / "work", recipe=RECIPES, target=TargetSpec(max_perplexity_ratio=0.01))
    report = Report.model_validate_json((tmp_path / "work" / OUTPUT / "report.json").read_text())
    assert not any(candidate.meets_target for candidate in report.candidates)
    assert [one.rung for one in report.tries[:2]] == ["as asked", "as asked"]


def test_a_missed_target_may_be_published(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    target = TargetSpec(max_perplexity_ratio=0.01, on_miss="publish")
    published = EngineRun(tiny_spec(RECIPES, target=target), model, tmp_path / "work")
    figures = ratios(published.report)
    assert [output.recipe_index for output in published.finished.outputs] == [figures.index(min(figures))]
    assert not any(candidate.meets_target for candidate in published.report.candidates)
    assert "it is published as asked" in published.report.notes[-1]


def test_an_operator_without_its_kernel_is_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallbacks, "MET", {("pack", "no CUDA compiler"): None})
    job = EngineRun(
        tiny_spec(Recipe(group_size=32, method="rtn")), tiny_model(tmp_path / "model"), tmp_path / "w"
    )
    sentence = "pack ran in PyTorch instead of its kernel: no CUDA compiler"
    assert sentence in job.report.notes
    assert Noted(code="kernel_fallback", message=sentence) in job.messages
