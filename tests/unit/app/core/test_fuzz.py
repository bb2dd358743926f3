"""Made-up input for the parsers that strangers reach: refused in our own words, or right."""

from __future__ import annotations

import json
import math
import os
import re
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors import deserialize

from app.core.errors import ModelRefused, NibbleError
from app.core.planning.plan import plan_job
from app.core.records.patterns import check_pattern
from app.core.records.specs import JobSpec
from app.core.sources.safetensors_header import TensorHeader, header_length, parse_header

# `make fuzz` sets FUZZ, the number of examples, and then looks elsewhere each time.
EXAMPLES = os.environ.get("FUZZ")
fuzzed = settings(
    max_examples=int(EXAMPLES or 200), deadline=None, derandomize=EXAMPLES is None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
sizes = st.sampled_from([0, 1, 2, 3, 4, 8, 16, -1, 2**40])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "U8", "I64", "F8_E4M3", "X", ["F32"], None]),
        "shape": st.lists(sizes, max_size=3) | documents,
        "data_offsets": st.lists(sizes, max_size=3) | documents,
    }
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | documents, max_size=3)


@fuzzed
@given(header=headers | documents, body=st.binary(max_size=40), claim=st.integers(-3, 3))
def test_a_header_is_refused_or_means_what_the_format_says(header: Any, body: bytes, claim: int) -> None:
    text = json.dumps(header).encode()
    data = max(0, len(text) + claim).to_bytes(8, "little") + text + body
    try:
        length = header_length("f", data[:8], len(data))
        tensors = parse_header("f", data[8 : 8 + length], len(data))
    except ModelRefused:
        return
    assert {name for name, _ in deserialize(data)} == set(tensors)


def valid_file() -> bytes:
    entry = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(entry).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@fuzzed
@given(place=st.integers(0, len(valid_file()) - 1), value=st.integers(0, 255), cut=st.integers(0, 80))
def test_a_damaged_file_is_refused_or_read(place: int, value: int, cut: int) -> None:
    data = bytearray(valid_file())
    data[place] = value
    data = data[: max(0, len(data) - cut)]
    try:
        length = header_length("f", bytes(data[:8]), len(data))
        parse_header("f", bytes(data[8 : 8 + length]), len(data))
    except ModelRefused:
        return
    assert length <= len(data) - 8


fields = st.sampled_from([*JobSpec.model_fields, "method", "bits", "overrides", "match", "search", "other"])
bodies = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(fields, inner, max_size=5)
)


@fuzzed
@given(body=st.dictionaries(fields, bodies, max_size=6))
def test_a_body_is_refused_by_validation_or_is_a_job(body: dict[str, Any]) -> None:
    try:
        spec = JobSpec.model_validate(body)
    except ValidationError:
        return
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


# Recipes of known words with values at and beyond their limits: most pass validation and meet the plan.
patterns = st.sampled_from(
    [
        "lm_head",
        "re:.*",
        "re:.*down_proj$",
        r"re:model\.layers\.0\..*",
        "re:(",
        "re:",
        "model.layers.1.mlp",
        "*",
    ]
)
changes = {
    "bits": st.sampled_from([2, 3, 4, 8, 5, 0]),
    "group_size": st.sampled_from([32, 64, 128, -1, 0, 48]),
    "symmetric": st.booleans(),
}
recipes = st.fixed_dictionaries(
    {},
    optional={
        **changes,
        "method": st.sampled_from(["rtn", "awq", "gptq", "omniquant", "x"]),
        "rounding": st.sampled_from(["nearest", "gptq", "x"]),
        "ignore": st.lists(patterns, max_size=3),
        "indivisible": st.sampled_from(["refuse", "shrink", "skip", "smaller_groups", "keep"]),
        "search": st.fixed_dictionaries(
            {},
            optional={
                "strategy": st.sampled_from(["grid", "evolutionary", "x"]),
                "grid_points": st.integers(-1, 300),
                "duo_scaling": st.sampled_from(["both", True, False, "x"]),
                "clip": st.booleans(),
            },
        ),
        "overrides": st.lists(
            st.fixed_dictionaries({"match": patterns}, optional=changes | {"x": st.none()}), max_size=3
        ),
    },
)
job_bodies = st.fixed_dictionaries(
    {"model": st.just("m"), "recipe": recipes | st.lists(recipes, max_size=3)},
    optional={
        "formats": st.lists(st.sampled_from(["awq", "gptq", "compressed-tensors"]), max_size=3),
        "target": st.fixed_dictionaries(
            {}, optional={"max_kl": st.floats(), "max_perplexity_ratio": st.floats()}
        ),
    },
)
CONFIG: dict[str, object] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 192,
    "vocab_size": 1000,
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (192, 192), "self_attn.k_proj": (96, 192), "self_attn.v_proj": (96, 192),
    "self_attn.o_proj": (192, 192), "mlp.gate_proj": (320, 192), "mlp.up_proj": (320, 192),
    "mlp.down_proj": (192, 320), "input_layernorm": (192,), "post_attention_layernorm": (192,),
}  # fmt: skip


def model_tensors() -> dict[str, TensorHeader]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (1000, 192),
        "model.norm.weight": (192,),
    }
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in SHAPES.items()}
    return {
        name: TensorHeader(dtype="BF16", shape=shape, file="f", start=0, end=2 * math.prod(shape))
        for name, shape in shapes.items()
    }


@fuzzed
@given(body=job_bodies)
def test_a_recipe_is_refused_in_our_words_or_planned_for_every_linear(body: dict[str, Any]) -> None:
    try:
        spec = JobSpec.model_validate(body)
        plan = plan_job(spec, CONFIG, model_tensors())
    except (ValidationError, NibbleError):
        return
    assert [candidate.recipe for candidate in plan.candidates] == list(spec.recipes)
    for candidate in plan.candidates:
        assert len(candidate.linears) == 14
        assert set(candidate.output_bytes) == set(spec.formats)
        assert math.isfinite(candidate.bits_per_weight)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+x", r"(.*)*x", r"(a|a)*x", r"(.+)+$", r"((a+))+x", r"(?:(?:a*)b?)*c", r".*.*.*.*x",
        r"(a{1,20}){1,20}x", r"(?=a+)+", r"(.)\1*", r"(?i)a", r"(", r"a{99999999999}", r"[a", "(" * 200,
    ],
)  # fmt: skip
def test_patterns_that_could_run_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"regular expression|very long|not allowed"):
        check_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    [r".*\.down_proj$", r"model\.layers\.(0|31)\.mlp\..*", r".*[kq]_proj", r"lm_head", r"a\+(b|c)?"],
)
def test_patterns_that_people_write_are_accepted(pattern: str) -> None:
    check_pattern(pattern)


@fuzzed
@given(pattern=st.text(alphabet="ab.*+?(){}|\\,1:", max_size=14))
def test_what_is_accepted_matches_soon(pattern: str) -> None:
    try:
        check_pattern(pattern)
    except ValueError:
        return
    started = time.process_time()
    re.compile(pattern).fullmatch("a" * 60 + "!")
    assert time.process_time() - started < 5  # a refused pattern would take years
