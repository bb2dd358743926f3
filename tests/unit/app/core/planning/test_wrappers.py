"""Models with towers beside the language model: where its layers lie, and what loaders must leave alone."""

from __future__ import annotations

import re
from typing import Any

import pytest

from app.core.formats.file_format import ModuleSchemes, Scheme
from app.core.formats.registry import FORMATS, FormatName
from app.core.planning.plan import plan_job
from app.core.records.specs import matches
from app.core.sources.safetensors_header import TensorHeader
from tests.unit.app.core.planning.headers import SHAPES, asked, header

TEXT = {"num_hidden_layers": 2, "hidden_size": 192, "vocab_size": 1000}
TOWER = ("vision_tower.encoder.layers.0.self_attn.q_proj", "vision_tower.encoder.layers.0.mlp.fc1")
DRAFT = ("mtp.layers.0.self_attn.q_proj", "mtp.fc")
# Type and class, the layers in the files, the head there.
WRAPPERS = {
    "gemma3": ("Gemma3ForConditionalGeneration", "language_model.model.layers", "language_model.lm_head"),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "model.language_model.layers", "lm_head"),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "model.layers", "lm_head"),
}


def wrapper(model_type: str) -> tuple[dict[str, Any], dict[str, TensorHeader]]:
    class_name, layers, head = WRAPPERS[model_type]
    config = {"model_type": model_type, "architectures": [class_name], "text_config": TEXT}
    names = {f"{layers}.{n}.{name}.weight": header(s) for n in range(2) for name, s in SHAPES.items()}
    table = {layers.replace("layers", "embed_tokens") + ".weight": header((1000, 192))}
    others = {f"{name}.weight": header((64, 64)) for name in (*TOWER, *DRAFT)}
    return config, {**names, **table, f"{head}.weight": header((1000, 192)), **others}


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_the_layers_are_those_of_the_language_model(model_type: str) -> None:
    config, tensors = wrapper(model_type)
    plan = plan_job(asked(), config, tensors)
    layers = WRAPPERS[model_type][1]
    assert plan.architecture.stored_layers == layers
    assert plan.num_layers == 2
    names = [linear.name for linear in plan.candidates[0].linears]
    assert {name.removeprefix(f"{layers}.").partition(".")[2] for name in names} == set(SHAPES)
    assert plan.architecture.checkpoint_name(plan.architecture.embedding + ".weight") in tensors
    assert any(name in tensors for name in plan.architecture.head_names)


@pytest.mark.parametrize("model_type", WRAPPERS)
@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].single_file is None])
def test_loaders_leave_towers_and_drafts_alone_whatever_they_call_them(
    model_type: str, name: FormatName
) -> None:
    config, tensors = wrapper(model_type)
    candidate = plan_job(asked(name, symmetric=name == "gptq"), config, tensors).candidates[0]
    entry = FORMATS[name].entry(candidate.modules)
    for module in (*TOWER, *DRAFT):
        for around in ("", "model.", "language_model."):
            assert is_left_alone(name, entry, around + module)
    for linear in candidate.linears:
        assert not is_left_alone(name, entry, linear.name)


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].single_file is None])
def test_the_decoder_is_no_tower_where_transformers_calls_it_otherwise(name: FormatName) -> None:
    """The files say `backbone`, transformers and vLLM `model`: routers there are named one by one."""
    config = {"model_type": "nemotron_h", "layers_block_type": ["moe", "full_attention"], **TEXT}
    experts = {f"experts.{n}.{leaf}": (192, 192) for n in range(2) for leaf in ("up_proj", "down_proj")}
    moe = {
        "gate": (2, 192),
        **experts,
        "shared_experts.up_proj": (192, 192),
        "shared_experts.down_proj": (192, 192),
    }
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (192, 192))
    tensors = {
        f"backbone.layers.{n}.mixer.{linear}.weight": header(shape)
        for n, linears in enumerate((moe, attention))
        for linear, shape in linears.items()
    }
    tensors |= {n: header((1000, 192)) for n in ("backbone.embeddings.weight", "lm_head.weight")}
    candidate = plan_job(asked(name, symmetric=name == "gptq"), config, tensors).candidates[0]
    entry = FORMATS[name].entry(candidate.modules)
    for linear in candidate.linears:
        loaded = linear.name.replace("backbone", "model")
        assert not is_left_alone(name, entry, linear.name)
        assert not is_left_alone(name, entry, loaded)
    assert is_left_alone(name, entry, "model.layers.0.mixer.gate")


@pytest.mark.parametrize(
    ("model_type", "ignore", "said"),
    [
        ("gpt_oss", (), ("without the quantized experts", "vLLM 0.32's class of gpt_oss")),
        ("gpt_oss", (r"re:.*\.experts\..*",), ()),
        ("kimi_linear", (), ("does not open compressed-tensors files of kimi_linear (RuntimeError",)),
        ("llama", (), ()),
    ],
)
def test_notes_say_which_loaders_do_not_read_files_of_the_type(
    model_type: str, ignore: tuple[str, ...], said: tuple[str, ...]
) -> None:
    linears = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.0.up_proj")
    scheme = Scheme(bits=4, group_size=128, symmetric=True)
    modules = ModuleSchemes(
        {name: None if any(matches(each, name) for each in ignore) else scheme for name in linears},
        fused_experts=True,
    )
    notes = list(FORMATS["compressed-tensors"].loader_notes(modules, model_type))
    assert len(notes) == len(said)
    for note, words in zip(notes, said, strict=True):
        assert words in note
        assert "let `ignore` match all experts" in note or model_type != "gpt_oss"


def is_left_alone(name: FormatName, entry: dict[str, Any], module: str) -> bool:
    """As loaders of the format look a module up."""
    if name == "awq":
        return any(each in module for each in entry["modules_to_not_convert"])
    if name == "gptq":
        return any(re.match(rule[2:], module) for rule in entry["dynamic"] if rule.startswith("-:"))
    names = entry["ignore"]
    return module in names or any(re.match(each[3:], module) for each in names if each.startswith("re:"))


def test_of_a_model_without_towers_no_pattern_is_written() -> None:
    config = {"model_type": "llama", "tie_word_embeddings": True, **TEXT}
    tensors = {f"model.layers.{n}.{name}.weight": header(s) for n in range(2) for name, s in SHAPES.items()}
    tensors["model.embed_tokens.weight"] = header((1000, 192))
    candidate = plan_job(asked(), config, tensors).candidates[0]
    assert candidate.towers == ()
    assert FORMATS["compressed-tensors"].entry(candidate.modules)["ignore"] == ["lm_head"]
