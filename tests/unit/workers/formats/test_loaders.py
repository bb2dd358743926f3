"""Every loader finds in our entries what the plan says, for every architecture, by the names it asks by."""

from __future__ import annotations

import re
from typing import Any

import pytest

from app.core.formats.file_format import Scheme
from app.core.formats.registry import FORMATS
from app.core.formats.targets import fused_names
from app.core.planning.family import LayerKind, each_expert, known_family
from app.core.planning.plan import CandidatePlan, plan_job
from app.core.sources.safetensors_header import TensorHeader
from tests.tiny_models import FIRST_TYPES
from tests.unit.app.core.planning.headers import asked, header
from tests.unit.workers.formats.loaders import (
    awq_server,
    awq_transformers,
    ct_library,
    ct_server,
    gptq_server,
    in_vllm,
)

LAYERS = 12  # numbers of one and of two digits: one must not match in another
EXPERTS = {"num_local_experts": 3, "num_experts": 3, "n_routed_experts": 3, "first_k_dense_replace": 1}
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
LOW_RANK = ("q_a_proj", "kv_a_proj_with_mqa")
VLLM = {"qkv_proj": QKV, "gate_up_proj": GATE_UP, "fused_qkv_a_proj": LOW_RANK}
SGLANG = {"qkv_proj": QKV, "gate_up_proj": GATE_UP, "fused_qkv_a_proj_with_mqa": LOW_RANK}
RECIPES: dict[str, dict[str, Any]] = {
    "one scheme": {},
    "a layer is kept": {"ignore": ["lm_head", r"re:.*layers\.1\..*"]},
    "attention is kept": {"ignore": ["lm_head", r"re:.*attn.*", r"re:.*attention.*"]},
    "mlp is kept": {"ignore": ["lm_head", r"re:.*mlp\..*", r"re:.*block_sparse_moe\..*", r"re:.*fc\d"]},
    "experts are kept": {"ignore": ["lm_head", r"re:.*experts\.\d+.*"]},
    "one layer is wide": {"overrides": [{"match": r"re:.*layers\.1\..*", "bits": 8}]},
    "attention is wide": {"overrides": [{"match": r"re:.*(attn|attention).*", "bits": 8}]},
    "experts are wide": {"overrides": [{"match": r"re:.*experts\.\d+.*", "bits": 8, "group_size": 32}]},
}
# What vLLM 0.32's classes rename (`hf_to_vllm_mapper`).
WRAPPED = {r"^model\.language_model\.": "language_model.model."}
CLASSES_OF_VLLM = {
    "gemma3": WRAPPED,
    "qwen3_vl": WRAPPED,
    "qwen3_vl_moe": WRAPPED,
    "gpt_oss": {r"\.self_attn\.": ".attn.", r"\.down_proj$": ".w2_weight"},
    "lfm2": {r"\.conv\.": ".short_conv."},
    "granitemoehybrid": {r"\.mamba\.": ".mixer."},
}
OUTSIDE = ("model.embed_vision.embedding_projection", "mtp.fc", "v_head.summary")


def kind_of(kinds: tuple[LayerKind, ...], *, sparse: bool) -> LayerKind:
    """The first layers' or the later ones', with queries of low rank where the family has them."""
    ranked = [kind for kind in kinds if "self_attn.q_a_proj" in kind.linears] or list(kinds)
    return next((kind for kind in ranked if (kind.experts is not None) is sparse), ranked[0])


def model(model_type: str) -> tuple[dict[str, object], dict[str, TensorHeader]]:
    """Config and headers with a layer beyond the config's, as drafts of further tokens are stored."""
    config: dict[str, object] = {
        "model_type": model_type, "num_hidden_layers": LAYERS, "hidden_size": 64, "vocab_size": 100,
        "tie_word_embeddings": True, "q_lora_rank": 8, "num_nextn_predict_layers": 1, **EXPERTS,
    }  # fmt: skip
    family = known_family(model_type)
    assert family is not None
    names = [family.embedding, *OUTSIDE]
    for layer in range(LAYERS + 1):
        kind, prefix = kind_of(family.kinds, sparse=layer > 0), f"{family.layers}.{layer}."
        names += [prefix + name for name in each_expert(kind.linears, 3)]
        names += [prefix + router for group in kind.groups for router in group.compensated]
    beyond = f"{family.layers}.{LAYERS}."
    names += [beyond + name for name in ("eh_proj", "shared_head.head", "embed_tokens")]
    return config, {name + ".weight": header((64, 64)) for name in names}


def candidate(model_type: str, name: str, recipe: str) -> CandidatePlan:
    spec = asked(name, symmetric=name == "gptq", **RECIPES[recipe])
    return plan_job(spec, *model(model_type)).candidates[0]


def has_experts(model_type: str) -> bool:
    family = known_family(model_type)
    return family is not None and any(kind.experts is not None for kind in family.kinds)


CASES = [
    (model_type, recipe)
    for model_type in FIRST_TYPES
    for recipe in RECIPES
    if "experts" not in recipe or has_experts(model_type)
]
EVERY = pytest.mark.parametrize(("model_type", "recipe"), CASES)


def schemes_of(planned: CandidatePlan, tensors: dict[str, TensorHeader]) -> dict[str, Scheme | None]:
    """By linear of the checkpoint: what the plan says, and None for what it does not quantize."""
    tables = ("embed_tokens", "embed_in")
    names = (name.removesuffix(".weight") for name in tensors)
    others = {name: None for name in names if not name.endswith(tables)}
    return {**others, **{linear.name: linear.scheme for linear in planned.linears}}


def wholes(schemes: dict[str, Scheme | None], fused: dict[str, tuple[str, ...]]) -> dict[str, Scheme | None]:
    """By module of a server: fused matrices and the linears that are none of their parts; no experts."""
    found: dict[str, Scheme | None] = {}
    for name, scheme in schemes.items():
        parent, _, leaf = name.rpartition(".")
        whole = next((fused_leaf for fused_leaf, parts in fused.items() if leaf in parts), leaf)
        if ".experts." not in name:
            assert found.setdefault(f"{parent}.{whole}", scheme) == scheme
    return found


def expert_sets(schemes: dict[str, Scheme | None]) -> dict[str, Scheme | None]:
    found: dict[str, Scheme | None] = {}
    for name, scheme in schemes.items():
        if ".experts." in name:
            module = re.sub(r"\.experts\..*", ".experts", name)
            assert found.setdefault(module, scheme) == scheme
    return found


@pytest.mark.parametrize(("model_type", "recipe"), [case for case in CASES if "wide" not in case[1]])
def test_awq(model_type: str, recipe: str) -> None:
    planned = candidate(model_type, "awq", recipe)
    entry = FORMATS["awq"].entry(planned.modules)
    schemes = schemes_of(planned, model(model_type)[1])
    experts = expert_sets(schemes)
    for name, scheme in {**wholes(schemes, VLLM), **experts}.items():
        assert awq_server(entry, name, VLLM) == scheme, name
        assert awq_server(entry, name, {}) == scheme, name  # a draft's class of vLLM lists no fused matrices
    for name, scheme in {**wholes(schemes, SGLANG), **experts}.items():
        assert awq_server(entry, name, {}) == scheme, name
    for name, scheme in schemes.items():
        assert awq_transformers(entry, name) == scheme, name


@EVERY
def test_gptq(model_type: str, recipe: str) -> None:
    planned = candidate(model_type, "gptq", recipe)
    entry = FORMATS["gptq"].entry(planned.modules)
    schemes = schemes_of(planned, model(model_type)[1])
    asked_by = {**schemes, **wholes(schemes, VLLM), **wholes(schemes, SGLANG), **expert_sets(schemes)}
    for name, scheme in asked_by.items():
        assert gptq_server(entry, name) == scheme, name


@EVERY
def test_compressed_tensors(model_type: str, recipe: str) -> None:
    planned = candidate(model_type, "compressed-tensors", recipe)
    entry = FORMATS["compressed-tensors"].entry(planned.modules)
    schemes = schemes_of(planned, model(model_type)[1])
    for fused, suffix in ((VLLM, False), (SGLANG, True)):
        for name, scheme in wholes(schemes, fused).items():
            for listed in (fused, {}):  # most classes of SGLang and vLLM's of drafts list no fused matrices
                assert ct_server(entry, name, listed, suffix=suffix) == scheme, name
    family = known_family(model_type)
    assert family is not None
    experts = kind_of(family.kinds, sparse=True).experts
    for module, scheme in expert_sets(schemes).items():
        assert experts is not None
        for leaf in {experts.gate, experts.up, experts.down}:
            assert ct_server(entry, f"{module}.0.{leaf}", VLLM) == scheme
        for leaf in ("gate_proj", "up_proj", "down_proj"):  # whatever the checkpoint calls them
            assert ct_server(entry, f"{module}.0.{leaf}", SGLANG, suffix=True) == scheme
    for name, scheme in schemes.items():
        assert ct_library(entry, name) == scheme, name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model_type", CLASSES_OF_VLLM)
def test_compressed_tensors_where_a_class_of_vllm_has_other_names(model_type: str, recipe: str) -> None:
    if "experts" in recipe and not has_experts(model_type):
        pytest.skip("it has none")
    changes = CLASSES_OF_VLLM[model_type]

    def rename(name: str) -> str:
        for pattern, other in changes.items():
            name = re.sub(pattern, other, name)
        return name

    planned = candidate(model_type, "compressed-tensors", recipe)
    entry = in_vllm(FORMATS["compressed-tensors"].entry(planned.modules), rename)
    schemes = schemes_of(planned, model(model_type)[1])
    for name, scheme in wholes(schemes, {**VLLM, "w13": ("w1", "w3")}).items():
        assert ct_server(entry, rename(name), VLLM) == scheme, name
    for module, scheme in expert_sets(schemes).items():
        for leaf in ("gate_proj", "up_proj", "down_proj"):  # whose layers vLLM renames, and not these
            assert ct_server(entry, f"{rename(module)}.0.{leaf}", VLLM) == scheme


def test_modules_outside_the_layers_are_left_alone_wherever_a_class_has_them() -> None:
    config, tensors = model("gemma3n_text")
    tensors |= {f"model.{name}.weight": header((64, 64)) for name in ("altup_projections.0", "projection")}
    entry = FORMATS["compressed-tensors"].entry(
        plan_job(asked("compressed-tensors"), config, tensors).candidates[0].modules
    )
    for name in ("altup_projections.0", "projection"):
        assert ct_server(entry, f"language_model.model.self_decoder.{name}", VLLM) is None
    assert ct_server(entry, "language_model.model.layers.0.mlp.down_proj", VLLM) is not None


@pytest.mark.parametrize(("model_type", "noted"), [("gpt_oss", True), ("mixtral", False)])
def test_a_note_says_whose_experts_vllm_passes_over(model_type: str, noted: bool) -> None:
    plan = plan_job(asked("compressed-tensors"), *model(model_type))
    assert any("passes over" in note for note in plan.notes) is noted


def test_tables_are_not_listed_and_linears_with_such_a_name_are() -> None:
    planned = candidate("deepseek_v3", "compressed-tensors", "one scheme")
    assert "model.embed_vision.embedding_projection" in planned.full_precision
    assert {f"model.layers.{LAYERS}.eh_proj", f"model.layers.{LAYERS}.mlp.gate"} <= {*planned.full_precision}
    assert not [name for name in planned.full_precision if name.endswith("embed_tokens")]


def test_experts_of_drafts_that_stay_fused_are_found_unquantized_by_every_server() -> None:
    """As hub files of Qwen3.5 MoE hold those of `mtp.layers.0`, which vLLM builds with the same entry."""
    config, tensors = model("qwen3_moe")
    block = "mtp.layers.0.mlp.experts"
    tensors |= {f"{block}.gate_up_proj": header((3, 128, 64)), f"{block}.down_proj": header((3, 64, 64))}
    for name in ("awq", "gptq", "compressed-tensors"):
        planned = plan_job(asked(name, symmetric=name == "gptq"), config, tensors).candidates[0]
        entry = FORMATS[name].entry(planned.modules)
        if name == "awq":
            assert awq_server(entry, block, VLLM) is None
        if name == "gptq":
            assert gptq_server(entry, block) is None
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            expert = f"{block}.0.{leaf}"
            if name == "gptq":
                assert gptq_server(entry, expert) is None
            elif name == "compressed-tensors":
                assert ct_server(entry, expert, VLLM) is None
                assert ct_server(entry, expert, {}, suffix=True) is None


def test_matrices_that_servers_fuse_are_named_as_a_whole_too() -> None:
    """In hybrid models (vLLM 0.32: qwen3_5.py, lfm2.py)."""
    wholes_of = {
        "linear_attn.in_proj_qkvz": ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
        "linear_attn.in_proj_ba": ("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
        "feed_forward.w13": ("feed_forward.w1", "feed_forward.w3"),
    }
    for whole, parts in wholes_of.items():
        assert {fused for part in parts for fused in fused_names(part)} == {whole}
    assert fused_names("feed_forward.experts.0.w1") == ()
