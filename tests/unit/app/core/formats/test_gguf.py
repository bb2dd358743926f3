"""What the format gguf holds and refuses, when a job is submitted."""

from __future__ import annotations

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from app.core.deployments.served_families import refuse_unserved_format
from app.core.errors import ModelRefused, RecipeUnsupported
from app.core.formats.gguf import BLOCK, BLOCKS, FAMILIES, GgufFormat
from app.core.planning.format_fit import refuse_single_files
from tests.unit.app.core.planning.headers import asked, planned


def test_blocks_are_those_of_the_library() -> None:
    for layout in BLOCKS.values():
        assert GGML_QUANT_SIZES[GGMLQuantizationType[layout.name]] == (BLOCK, layout.size)


@pytest.mark.parametrize(
    ("recipe", "why", "nearest"),
    [
        ({"group_size": 64}, "groups of 32, not of 64", "group_size 32"),
        ({"group_size": -1}, "groups of 32, not of whole rows", "group_size 32"),
        ({"group_size": 32, "bits": 3}, "holds 4 and 8 bits, not 3", "bits 4"),
        ({"group_size": 32, "bits": 2}, "holds 4 and 8 bits, not 2", "bits 4"),
        ({"group_size": 32, "bits": 8}, "8 bits without zero points only", "symmetric true"),
        ({"group_size": "auto", "scheme": "fp8"}, "integer weights alone, not fp8", "compressed-tensors"),
        ({"group_size": "auto", "scheme": "mxfp4a16"}, "not mxfp4a16", "compressed-tensors"),
    ],
)
def test_a_recipe_is_refused_with_the_nearest(recipe: dict[str, object], why: str, nearest: str) -> None:
    with pytest.raises(RecipeUnsupported) as refusal:
        planned(asked("gguf", **recipe))
    assert refusal.value.code == "format_cannot_hold_recipe"
    assert why in refusal.value.message
    assert nearest in refusal.value.remedy


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "gemma3_text"}, "not gemma3_text: its vocabulary is SentencePiece's"),
        ({"model_type": "qwen3_moe"}, "not qwen3_moe: its experts"),
        ({"model_type": "phi3"}, "not phi3: its fused"),
        ({"model_type": "cohere"}, "not cohere"),
        ({"model_type": "mistral"}, "sliding_window None, not 4096"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding_window None, not 8"),
        ({"hidden_act": "gelu"}, "hidden_act 'silu', not 'gelu'"),
        ({"attention_bias": True}, "attention_bias False, not True"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "not rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "not rope_type 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "not partial_rotary_factor 0.5"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 2}, "no_rope_layer_interval 4, not 2"),
    ],
)
def test_a_model_is_refused_with_its_reason(config: dict[str, object], why: str) -> None:
    refusal = GgufFormat().model_refusal(str(config.get("model_type", "llama")), config)
    assert refusal is not None
    assert why in refusal.why


def test_a_refused_model_is_refused_by_the_plan() -> None:
    with pytest.raises(RecipeUnsupported, match="not rope_type 'yarn'") as refusal:
        planned(asked("gguf", group_size=32), {"rope_scaling": {"type": "yarn", "factor": 4.0}})
    assert (refusal.value.code, refusal.value.param) == ("format_cannot_hold_model", "formats")
    assert "compressed-tensors" in refusal.value.remedy


def test_a_job_that_reads_no_layer_is_refused() -> None:
    with pytest.raises(RecipeUnsupported, match="written layer by layer") as refusal:
        refuse_single_files(("awq", "gguf"))
    assert "evaluation" in refusal.value.remedy
    refuse_single_files(("awq", "gptq", "compressed-tensors"))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_its_families_are_held(model_type: str) -> None:
    assert GgufFormat().model_refusal(model_type, {"model_type": model_type, "sliding_window": None}) is None


def test_auto_is_the_only_group_size() -> None:
    plan = planned(asked("gguf", "compressed-tensors", group_size="auto"))
    (candidate,) = plan.candidates
    assert {linear.scheme.group_size for linear in candidate.linears if linear.scheme} == {32}
    assert "recipe 0: group_size 32, the only one of the format gguf" in plan.choices


def test_vectors_are_counted_in_float32() -> None:
    sizes = planned(asked("gguf", group_size=32)).candidates[0].output_bytes
    matrices, embedding, norms = 2 * (192 * 192 * 2 + 96 * 192 * 2 + 320 * 192 * 3), 1000 * 192 * 2, 3 * 192
    assert sizes == {"gguf": matrices // 32 * 20 + embedding + norms * 4}


def test_deployments_refuse_it_and_name_what_serves_it() -> None:
    with pytest.raises(ModelRefused, match="llama-server -m") as refusal:
        refuse_unserved_format("gguf", param="artifact")
    assert refusal.value.code == "format_not_served"
    assert "compressed-tensors" in refusal.value.remedy
    assert "gguf" not in refusal.value.remedy
    refuse_unserved_format("awq", param="artifact")
