"""Which recipe is recommended, what else would do, and what is ruled out with which reason."""

from __future__ import annotations

from typing import Any

import pytest

from app.core.errors import InvalidRequest, ModelRefused
from app.core.jobs.recommendation import (
    OPTIONS,
    USABLE,
    Recommendation,
    RecommendationRequest,
    recommend,
)
from app.core.records.specs import JobSpec
from app.core.sources.model_headers import ModelHeaders
from tests.unit.app.core.planning.headers import header

GIB = 2**30
LAYERS, HIDDEN = 32, 4096
SHAPES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN, "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}  # fmt: skip
ONE_SEQUENCE = 2 * 2 * 1024 * LAYERS * 8192  # bytes: two bytes for keys and values of 8192 tokens


def headers(**config: Any) -> ModelHeaders:
    """Of Llama-3-8B's shape."""
    tensors = {
        "model.embed_tokens.weight": header((128256, HIDDEN)), "model.norm.weight": header((HIDDEN,)),
        "lm_head.weight": header((128256, HIDDEN)),
    }  # fmt: skip
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{name}.weight": header(shape) for name, shape in SHAPES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = header((HIDDEN,))
    return ModelHeaders(
        config={**CONFIG, **config}, tensors=tensors, files={}, side_files=(), code=(), notes=()
    )


def recommended(gpu: str, memory: str | None = None, **asked: Any) -> Recommendation:
    body = {"model": "m", "gpu": gpu, "memory": memory, **asked}
    return recommend(RecommendationRequest.model_validate(body), "m", headers())


def reasons(found: Recommendation) -> dict[str, str]:
    return {one.scheme: one.why for one in found.ruled_out}


def test_eight_bits_where_they_leave_room() -> None:
    found = recommended("h100")
    assert found.recommended is not None
    assert (found.recommended.scheme, found.recommended.recipe.method) == ("fp8", "rtn")
    assert found.memory_bytes == 80 * 10**9
    assert found.usable_bytes == int(found.memory_bytes * USABLE)
    assert found.cache_bytes_per_token == 2 * 2 * 1024 * LAYERS
    room = found.usable_bytes - found.recommended.output_bytes
    assert found.recommended.room_bytes == room
    assert found.recommended.cache_sequences == room // ONE_SEQUENCE
    assert found.recommended.cache_tokens == room // found.cache_bytes_per_token
    assert found.original_fits
    order = [found.recommended.scheme, *(choice.scheme for choice in found.alternatives)]
    assert order.index("fp8") < order.index("w4a16") < order.index("w3a16") < order.index("w2a16")


def test_sizes_are_those_of_the_plan() -> None:
    found = recommended("h100")
    assert found.recommended is not None
    weights = LAYERS * sum(rows * columns for rows, columns in SHAPES.values())
    rows = LAYERS * sum(rows for rows, _ in SHAPES.values())
    dense = 2 * (2 * 128256 * HIDDEN + HIDDEN + 2 * LAYERS * HIDDEN)
    assert found.recommended.output_bytes == weights + 2 * rows + dense


def test_four_bits_where_eight_leave_no_room_for_the_sequences() -> None:
    roomy = recommended("a10", sequences=1).recommended
    full = recommended("a10", sequences=14).recommended
    assert roomy is not None
    assert full is not None
    assert (roomy.scheme, full.scheme) == ("fp8", "w4a16")
    assert full.recipe.rounding == "gptq"
    assert "little is lost" in full.why
    assert full.cache_sequences is not None
    assert full.cache_sequences >= 14


def test_a_file_that_does_not_fit_is_ruled_out_with_its_size() -> None:
    found = recommended("h100", "8GB", sequences=1)
    assert found.recommended is not None
    assert found.recommended.scheme == "w4a16"
    assert not found.original_fits
    fp8 = next(one for one in found.ruled_out if one.scheme == "fp8")
    assert fp8.output_bytes is not None
    assert fp8.output_bytes > found.usable_bytes
    assert "exceed the 7.4 GB that may be used" in fp8.why


def test_where_nothing_fits_the_smallest_size_is_named() -> None:
    found = recommended("h100", "3GB")
    assert found.recommended is None
    assert found.alternatives == ()
    assert len(found.ruled_out) == len(OPTIONS)
    assert any("the smallest file is w2a16" in note for note in found.notes)


def test_schemes_without_a_kernel_are_ruled_out_with_the_servers_names() -> None:
    assert "vLLM 0.33.0: none" in reasons(recommended("l40s"))["w4a8"]
    assert "SGLang 0.5.23: none" in reasons(recommended("l40s"))["w4a8"]
    assert "as those of nvfp4a16" in reasons(recommended("h100"))["nvfp4"]
    assert "nvfp4" not in reasons(recommended("b200"))
    assert "vLLM 0.33.0: emulated" in reasons(recommended("mi300x"))["nvfp4a16"]
    on_cpu = recommended("cpu", "32GB")
    assert {"w3a16", "w8a16", "nvfp4a16"} <= set(reasons(on_cpu))
    assert on_cpu.recommended is not None
    assert on_cpu.recommended.advice.speeds == ()


def test_int8_where_fp8_is_not_multiplied() -> None:
    """An A100 reads FP8 as weights alone, which is no promise for many sequences."""
    few, many = (recommended("a100", sequences=count, context=512).recommended for count in (16, 64))
    assert few is not None
    assert many is not None
    assert (few.scheme, many.scheme) == ("fp8", "w8a8")


def test_the_recommended_recipe_is_a_job() -> None:
    for gpu in ("h100", "b200", "a10"):
        found = recommended(gpu)
        for choice in filter(None, (found.recommended, *found.alternatives)):
            body = {"model": "m", "recipe": choice.recipe.model_dump(mode="json"), "formats": [choice.format]}
            JobSpec.model_validate_json(JobSpec.model_validate(body).model_dump_json())


def test_a_cache_in_fp8_where_it_holds_what_was_asked() -> None:
    usual, more = (recommended("h100", "24GB", sequences=count).recommended for count in (12, 14))
    assert usual is not None
    assert more is not None
    assert (usual.scheme, usual.recipe.kv_cache) == ("fp8", None)
    assert (more.scheme, more.recipe.kv_cache) == ("fp8", "fp8")
    assert usual.cache_sequences == usual.room_bytes // ONE_SEQUENCE == 12
    assert more.cache_sequences == more.room_bytes // (ONE_SEQUENCE // 2) == 24
    for choice in recommended("a100", "24GB", sequences=14).alternatives:  # it has no FP8
        assert choice.recipe.kv_cache is None


def test_three_bits_are_no_way_to_more_sequences() -> None:
    found = recommended("a100", "10GB", sequences=5)
    assert found.recommended is not None
    assert (found.recommended.scheme, found.recommended.cache_sequences) == ("w4a16", 3)
    three = next(choice for choice in found.alternatives if choice.scheme == "w3a16")
    assert three.cache_sequences is not None
    assert three.cache_sequences > 3
    assert "fewer than the 5 asked for" in found.recommended.why


def test_an_unknown_model_is_rounded_without_calibration() -> None:
    request = RecommendationRequest(model="m", gpu="h100")
    found = recommend(request, "m", headers(model_type="someone_new", architectures=["SomeoneNew"]))
    assert found.recommended is not None
    assert found.recommended.recipe.method == "rtn"


def test_memory_that_nobody_knows_is_asked_for() -> None:
    with pytest.raises(InvalidRequest, match="how much memory a CPU has is not known"):
        recommended("cpu")


def test_a_model_without_linears_is_refused() -> None:
    empty = headers().model_copy(update={"tensors": {"model.norm.weight": header((HIDDEN,))}})
    with pytest.raises(ModelRefused):
        recommend(RecommendationRequest(model="m", gpu="h100"), "m", empty)


@pytest.mark.parametrize("memory", ["lots", "-1", "0", "24 elephants"])
def test_impossible_memory_is_refused(memory: str) -> None:
    with pytest.raises(ValueError, match="memory"):
        RecommendationRequest.model_validate({"model": "m", "gpu": "h100", "memory": memory})
