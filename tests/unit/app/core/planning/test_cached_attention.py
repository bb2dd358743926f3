"""Which models get scales of a cache, and what is refused, at submission."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from app.core.errors import RecipeUnsupported
from app.core.formats.registry import FORMATS, FormatName
from app.core.planning.architectures import Architecture
from app.core.planning.cached_attention import cache_notes, obstacle, value_linear
from app.core.planning.family import known_family
from app.core.records.specs import JobSpec, Recipe
from tests.unit.app.core.planning.headers import asked, planned


def architecture(model_type: str) -> Architecture:
    family = known_family(model_type)
    assert family is not None
    return Architecture.model_validate({**dict(family), "stored_layers": family.layers})


@pytest.mark.parametrize(
    ("model_type", "linears"),
    [
        ("llama", ["self_attn.v_proj"]),
        ("gemma2", ["self_attn.v_proj"]),
        ("phi3", ["self_attn.qkv_proj"]),
        ("gpt_oss", ["self_attn.v_proj"]),
        ("qwen3_next", [None, "self_attn.v_proj"]),
        ("jamba", [None, "self_attn.v_proj"]),
        ("olmo_hybrid", [None, "self_attn.v_proj"]),
        ("falcon_h1", ["self_attn.v_proj"]),
    ],
)
def test_layers_with_keys_and_values_are_told_by_their_linears(
    model_type: str, linears: list[str | None]
) -> None:
    model = architecture(model_type)
    assert obstacle(model, {}) is None
    distinct = {value_linear(kind) for kind in model.kinds}
    assert distinct == set(linears)


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("deepseek_v3", r"deepseek_v3 caches a latent .* \(self_attn.kv_a_proj_with_mqa\)"),
        ("kimi_linear", "caches a latent"),
        ("mamba2", "no layer of mamba2 is known to keep keys and values"),
        ("minimax", "what minimax caches is not clear from self_attn.qkv_proj"),
        ("gpt_neox", "is not clear from attention.query_key_value"),
        ("nemotron_h", "is not clear from mixer.k_proj, mixer.v_proj"),
        ("gemma4", "is not clear from self_attn.k_proj"),
        ("gemma3n", "attend to keys and values of other layers"),
    ],
)
def test_caches_that_are_not_clear_are_refused(model_type: str, why: str) -> None:
    assert re.search(why, obstacle(architecture(model_type), {}) or "")


def test_the_layers_of_the_model_count_not_those_of_its_family() -> None:
    """A granitemoehybrid of recurrent layers alone has no cache to scale."""
    model = architecture("granitemoehybrid")
    recurrent = [index for index, kind in enumerate(model.kinds) if value_linear(kind) is None]
    alone = model.model_copy(update={"layer_kinds": (recurrent[0],)})
    assert obstacle(model, {}) is None
    assert "is known to keep keys and values" in str(obstacle(alone, {}))


def test_layers_that_share_keys_are_refused() -> None:
    assert "2 layers of llama read keys" in str(obstacle(architecture("llama"), {"num_kv_shared_layers": 2}))
    with pytest.raises(RecipeUnsupported) as refusal:
        planned(asked(kv_cache="fp8"), {"num_kv_shared_layers": 2})
    assert (refusal.value.code, refusal.value.param) == ("kv_cache_unsupported", "recipe.kv_cache")
    assert refusal.value.remedy == "leave `kv_cache` out"


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "compressed-tensors"])
def test_formats_without_scales_of_a_cache_are_refused(name: FormatName) -> None:
    with pytest.raises(RecipeUnsupported, match=f"the format {name} holds no scales of a cache") as refusal:
        planned(asked(name, "compressed-tensors", kv_cache="fp8", symmetric=name == "gptq"))
    assert (refusal.value.code, refusal.value.param) == ("format_cannot_hold_recipe", "formats")
    assert "nearest valid choice: the format compressed-tensors" in refusal.value.remedy


def test_a_plan_names_the_modules_and_counts_their_bytes() -> None:
    plain, cached = planned(asked()).candidates[0], planned(asked(kv_cache="fp8")).candidates[0]
    assert cached.cached == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert plain.cached == ()
    grown = cached.output_bytes["compressed-tensors"] - plain.output_bytes["compressed-tensors"]
    assert grown == 2 * 2 * 2  # layers, keys and values, bytes of bfloat16
    assert cached.label == f"{plain.label} kv fp8"
    entries = [FORMATS["compressed-tensors"].entry(each.modules) for each in (plain, cached)]
    assert [entry.pop("kv_cache_scheme") for entry in entries] == [
        None,
        {
            "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "group_size": None,
            "actorder": None, "dynamic": False,
        },
    ]  # fmt: skip
    assert entries[0] == entries[1]


def test_layers_without_a_cache_are_counted_in_a_note() -> None:
    (note,) = cache_notes(("model.layers.3.self_attn",), 4)
    assert note.startswith("3 of 4 layers keep a state of one size")
    assert list(cache_notes(("a",), 1)) == list(cache_notes((), 4)) == []


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"kv_cache": "int8"}, "Input should be 'fp8'"),
        ({"kv_cache": True}, "Input should be 'fp8'"),
    ],
)
def test_other_numbers_are_refused(body: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Recipe.model_validate(body)


def test_without_an_evaluation_no_range_is_known() -> None:
    body = {"model": "m", "recipe": {"method": "rtn", "kv_cache": "fp8"}, "evaluation": None}
    with pytest.raises(ValidationError, match="kv_cache fp8 takes the range of keys and values from a text"):
        JobSpec.model_validate(body)


def test_other_numbers_in_files_are_no_cache_of_ours() -> None:
    stored = FORMATS["compressed-tensors"]
    scheme = stored.entry(planned(asked(kv_cache="fp8")).candidates[0].modules)["kv_cache_scheme"]
    assert stored.cache_in({"kv_cache_scheme": scheme}) == "fp8"
    assert stored.cache_in({"kv_cache_scheme": {**scheme, "strategy": "attn_head"}}) is None
    assert stored.cache_in({"kv_cache_scheme": {**scheme, "num_bits": 4}}) is None
    assert stored.cache_in({}) is None
    assert FORMATS["awq"].cache_in({"kv_cache_scheme": scheme}) is None
