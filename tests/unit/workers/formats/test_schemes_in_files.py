"""Schemes beside plain integers in compressed-tensors files: bytes, config and what its own library reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from app.core.formats.compressed_tensors import config_group, layout_of, scheme_of_group
from app.core.formats.file_format import ModuleSchemes, Scheme
from app.core.formats.registry import FORMATS
from app.core.formats.schemes import SCHEMES, SchemeName
from app.core.records.specs import Recipe
from tests.golden.make_packed import FROZEN, golden_scheme_weight
from workers.formats.compressed_tensors_packing import pack_linear, unpack_linear
from workers.modeling.float_numbers import FP8_SMALLEST
from workers.modeling.quantized_weight import QuantizedWeight
from workers.modeling.stored_dtypes import DTYPES

OTHERS: list[SchemeName] = [name for name in SCHEMES if name != "wna16"]
CODES_OF_OWN = [name for name in OTHERS if name != "w4a8"]  # w4a8 has the layout of plain integers
FORMAT = FORMATS["compressed-tensors"]


def scheme_named(name: SchemeName) -> Scheme:
    return Recipe(scheme=name).scheme_of("linear")


def frozen(case: str) -> dict[str, Tensor]:
    entries = json.loads(FROZEN.read_text("utf-8"))[case]
    return {
        name: torch.frombuffer(bytearray.fromhex(entry["hex"]), dtype=torch.uint8)
        .view(getattr(torch, entry["dtype"]))
        .view(entry["shape"])
        for name, entry in entries.items()
    }


@pytest.mark.parametrize("name", CODES_OF_OWN)
def test_the_frozen_bytes_are_read(name: SchemeName) -> None:
    expected = golden_scheme_weight(Recipe(scheme=name), 128 if name == "fp8-block" else 2)
    read = unpack_linear(frozen(f"compressed-tensors {name}"), {}, expected.scheme)
    assert isinstance(read, QuantizedWeight)
    assert read.equals(expected)


@st.composite
def scheme_weights(draw: st.DrawFn) -> QuantizedWeight:
    scheme = scheme_named(draw(st.sampled_from(CODES_OF_OWN)))
    rows = (
        scheme.kind.block_rows * draw(st.integers(1, 2))
        if scheme.kind.block_rows > 1
        else draw(st.integers(1, 20))
    )
    columns = 128 if scheme.group_size == -1 else scheme.group_size * draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    codes = torch.randint(0, 2**scheme.bits, (rows, columns), generator=generator).to(torch.uint8)
    if scheme.kind.numbers == "float" and scheme.bits == 8:
        codes[codes & 127 == 127] = 0  # not a number
    groups, divisor = scheme.groups(columns), None
    scale = torch.rand(rows, groups, generator=generator).to(torch.bfloat16).float() + FP8_SMALLEST
    match scheme.kind.scales:
        case "e8m0":
            scale = 2.0 ** torch.randint(-20, 20, (rows, groups), generator=generator)
        case "e4m3":
            divisor = torch.rand(1, generator=generator) + 0.5
            scale = (scale * 100).to(torch.float8_e4m3fn).float() / divisor
        case _:
            scale = scale.to(torch.bfloat16).float()
    scale = scale[:: scheme.kind.block_rows].repeat_interleave(scheme.kind.block_rows, dim=0)
    zero = torch.full(scale.shape, 0 if scheme.kind.numbers == "float" else 128, dtype=torch.uint8)
    inputs = scheme.kind.inputs
    ranged = torch.tensor([0.25]) if inputs is not None and inputs.needs_range else None
    return QuantizedWeight(codes, scale, zero, scheme, divisor, ranged)


@given(scheme_weights())
def test_what_is_written_is_read_by_us_and_by_compressed_tensors(weight: QuantizedWeight) -> None:
    scheme = weight.scheme
    stored = pack_linear(weight, torch.bfloat16)
    described = FORMAT.tensors(*weight.shape, scheme, "BF16")
    assert {key: (tuple(value.shape), value.dtype) for key, value in stored.items()} == {
        key: (tensor.shape, DTYPES[tensor.dtype]) for key, tensor in described.items()
    }
    read = unpack_linear(stored, {}, scheme)
    assert isinstance(read, QuantizedWeight)
    assert read.equals(weight)
    compressor: Any = BaseCompressor.get_value_from_registry(layout_of(scheme))
    group = QuantizationScheme.model_validate(config_group(ModuleSchemes({"a": scheme}), scheme, only=True))
    theirs = compressor.decompress(dict(stored), group)["weight"].float()
    # FP4 is dequantized in bfloat16 there.
    tolerance = 2.0**-7 if scheme.bits == 4 else 2.0**-8
    assert torch.allclose(theirs, weight.dequantize(), rtol=tolerance, atol=1e-30)


@pytest.mark.parametrize("name", OTHERS)
def test_the_config_is_accepted_and_says_which_scheme_it_is(name: SchemeName) -> None:
    scheme = scheme_named(name)
    entry = FORMAT.entry(ModuleSchemes({"model.layers.0.mlp.up_proj": scheme}, ("lm_head",)))
    QuantizationConfig.model_validate(entry)
    (group,) = entry["config_groups"].values()
    assert scheme_of_group(group) == scheme
    assert FORMAT.scheme_in(entry, "model.layers.0.mlp.up_proj") == scheme
    assert FORMAT.unreadable(entry) is None
    assert scheme_of_group({**group, "weights": {**group["weights"], "num_bits": 6}}) is None


def test_several_schemes_are_told_apart_by_name() -> None:
    recipe = Recipe.model_validate(
        {"scheme": "nvfp4", "overrides": [{"match": "down_proj", "scheme": "fp8"}]}
    )
    names = [f"model.layers.{layer}.mlp.{leaf}" for layer in (0, 1) for leaf in ("up_proj", "down_proj")]
    entry = FORMAT.entry(ModuleSchemes({name: recipe.scheme_of(name) for name in names}))
    assert entry["format"] == "mixed-precision"
    assert {group["format"] for group in entry["config_groups"].values()} == {
        "float-quantized", "nvfp4-pack-quantized",
    }  # fmt: skip
    for name in names:
        assert FORMAT.scheme_in(entry, name) == recipe.scheme_of(name)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"weight_scale": None}, "needs weight and weight_scale"),
        ({"weight_scale": torch.ones(3, 1)}, "does not belong"),
        ({"input_scale": None}, "needs the range of inputs"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Tensor | None], why: str) -> None:
    weight = golden_scheme_weight(Recipe(scheme="fp8-static"), 2)
    stored = {**pack_linear(weight, torch.bfloat16), **change}
    present = {name: tensor for name, tensor in stored.items() if tensor is not None}
    with pytest.raises(ValueError, match=why):
        unpack_linear(present, {}, weight.scheme)


@pytest.mark.parametrize(
    ("name", "linear", "noted"),
    [
        ("w4a8", "mlp.up_proj", ["9.0 alone"]),
        ("nvfp4", "mlp.up_proj", ["from compute capability 10.0 on", "bfloat16 alone"]),
        ("mxfp4a16", "mlp.experts.0.up_proj", ["bfloat16 alone"]),
        ("fp8", "mlp.experts.0.up_proj", ["whose experts have scheme fp8"]),
        ("fp8", "mlp.up_proj", []),
    ],
)
def test_who_opens_a_scheme_is_noted(name: SchemeName, linear: str, noted: list[str]) -> None:
    notes = list(FORMAT.loader_notes(ModuleSchemes({linear: scheme_named(name)}), "llama"))
    assert len(notes) == len(noted)
    for note, words in zip(notes, noted, strict=True):
        assert words in note
