"""Each format: weight -> tensors -> weight, for every scheme that it holds."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.core.formats.file_format import Scheme
from app.core.formats.registry import FORMATS, FormatName
from app.core.planning.format_fit import linear_bytes
from app.core.planning.plan import LinearPlan
from workers.formats import awq_packing, compressed_tensors_packing, gptq_packing
from workers.formats.packings import packing_of
from workers.modeling.quantized_weight import QuantizedWeight
from workers.modeling.stored_dtypes import DTYPES
from workers.quantization.grid import grouped_view, min_max_grid
from workers.quantization.rounding import round_nearest


def random_weight(scheme: Scheme, out_features: int, in_features: int, seed: int) -> QuantizedWeight:
    """Any integers; scales that float16 and bfloat16 hold."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(in_features)
    q = torch.randint(0, 2**scheme.bits, (out_features, in_features), generator=generator)
    if scheme.symmetric:
        zero = torch.full((out_features, groups), 2 ** (scheme.bits - 1))
    else:
        zero = torch.randint(0, 2**scheme.bits, (out_features, groups), generator=generator)
    scale = torch.randint(1, 128, (out_features, groups), generator=generator) * 2.0**-10
    return QuantizedWeight(q.to(torch.uint8), scale, zero.to(torch.uint8), scheme)


@st.composite
def packed_weights(draw: st.DrawFn) -> QuantizedWeight:
    """What compressed-tensors holds: any row count, any row length for whole-row groups."""
    group_size = draw(st.sampled_from([32, 64, 128, -1]))
    scheme = Scheme(
        bits=draw(st.sampled_from([2, 3, 4, 8])), group_size=group_size, symmetric=draw(st.booleans())
    )
    columns = draw(st.integers(1, 100)) if group_size == -1 else group_size * draw(st.integers(1, 3))
    return random_weight(scheme, draw(st.integers(1, 40)), columns, draw(st.integers(0, 10**6)))


@st.composite
def awq_weights(draw: st.DrawFn) -> QuantizedWeight:
    scheme = Scheme(bits=4, group_size=draw(st.sampled_from([32, 64, 128])), symmetric=False)
    columns = scheme.group_size * draw(st.integers(1, 3))
    return random_weight(scheme, 8 * draw(st.integers(1, 5)), columns, draw(st.integers(0, 10**6)))


@st.composite
def gptq_weights(draw: st.DrawFn) -> QuantizedWeight:
    bits, group_size = draw(st.sampled_from([2, 3, 4, 8])), draw(st.sampled_from([32, 64, 128, -1]))
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=True)
    columns = (32 if scheme.group_size == -1 else scheme.group_size) * draw(st.integers(1, 3))
    return random_weight(scheme, 32 * draw(st.integers(1, 2)), columns, draw(st.integers(0, 10**6)))


NAMES = {dtype: name for name, dtype in DTYPES.items()}


def check_round_trip(name: FormatName, weight: QuantizedWeight, dtype: torch.dtype) -> None:
    described, packing = FORMATS[name], packing_of(name)
    stored = packing.pack_linear(weight, dtype)
    assert packing.unpack_linear(stored, {}, weight.scheme).equals(weight.packed())
    if weight.shape[1] >= 32:  # below, several widths may take as many words
        assert packing.unpack_linear(stored, {}).equals(weight.packed())
    table = described.tensors(*weight.shape, weight.scheme, NAMES[dtype])
    assert {key: (tuple(value.shape), NAMES[value.dtype]) for key, value in stored.items()} == table
    assert described.suffixes[0] in stored
    assert set(stored) <= set(described.suffixes)


@given(packed_weights(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@settings(max_examples=80, deadline=None)
def test_compressed_tensors_come_back(weight: QuantizedWeight, dtype: torch.dtype) -> None:
    check_round_trip("compressed-tensors", weight, dtype)


@given(awq_weights(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_awq_comes_back(weight: QuantizedWeight, dtype: torch.dtype) -> None:
    check_round_trip("awq", weight, dtype)


@given(gptq_weights(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_gptq_comes_back(weight: QuantizedWeight, dtype: torch.dtype) -> None:
    check_round_trip("gptq", weight, dtype)


def field(words: list[int], index: int, bits: int) -> int:
    """Value `index` of a row of words, read as one long integer."""
    stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return (stream >> (bits * index)) & (2**bits - 1)


def weight_of_gptq(stored: dict[str, Tensor], bits: int) -> list[list[float]]:
    """(in, out): what the published note on GPTQ's first version says, entry by entry."""
    columns, zeros = stored["qweight"].T.tolist(), stored["qzeros"].tolist()
    scales, groups = stored["scales"].tolist(), stored["g_idx"].tolist()
    return [
        [
            (field(columns[out], row, bits) - (field(zeros[group], out, bits) + 1)) * scales[group][out]
            for out in range(len(columns))
        ]
        for row, group in enumerate(groups)
    ]


@given(gptq_weights())
@settings(max_examples=8, deadline=None)
def test_an_obvious_reader_of_gptq_reads_the_same_weight(weight: QuantizedWeight) -> None:
    stored = gptq_packing.pack_linear(weight, torch.bfloat16)
    assert weight_of_gptq(stored, weight.scheme.bits) == weight.dequantize().T.tolist()


def test_gptq_channels_out_of_order_are_refused() -> None:
    scheme = Scheme(bits=4, group_size=32, symmetric=True)
    stored = gptq_packing.pack_linear(random_weight(scheme, 32, 64, 0), torch.float16)
    stored["g_idx"] = stored["g_idx"].flip(0)
    with pytest.raises(ValueError, match="grouped out of order"):
        gptq_packing.unpack_linear(stored, {}, scheme)


@given(packed_weights())
@settings(max_examples=60, deadline=None)
def test_compressed_tensors_own_code_reads_the_same_weight(weight: QuantizedWeight) -> None:
    arguments = QuantizationArgs(
        num_bits=weight.scheme.bits,
        symmetric=weight.scheme.symmetric,
        strategy="channel" if weight.scheme.group_size == -1 else "group",
        group_size=None if weight.scheme.group_size == -1 else weight.scheme.group_size,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format="pack-quantized")
    stored = compressed_tensors_packing.pack_linear(weight, torch.float32)
    read = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    assert torch.equal(read.float(), weight.dequantize())


@given(awq_weights())
@settings(max_examples=40, deadline=None)
def test_an_independent_reader_of_awq_reads_the_same_integers(weight: QuantizedWeight) -> None:
    stored = awq_packing.pack_linear(weight, torch.bfloat16)
    q, scale, zero = AutoAWQConverter(group_size=weight.scheme.group_size)._convert_gemm_module(
        stored["qweight"], stored["scales"], stored["qzeros"]
    )
    assert zero is not None
    assert torch.equal(q.to(torch.int16) + 8, weight.q.to(torch.int16))
    assert torch.equal(zero.to(torch.int16) + 8, weight.zero.to(torch.int16))
    assert torch.equal(scale.float(), weight.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_planned_bytes_are_the_tensors_bytes(
    bits: int, group_size: int, dtype: torch.dtype, *, symmetric: bool
) -> None:
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
    weight = random_weight(scheme, 64, 96, 0)
    names: list[FormatName] = ["compressed-tensors"]
    if bits == 4 and not symmetric and group_size > 0:
        names.append("awq")
    if symmetric:
        names.append("gptq")
    for name in names:
        written = sum(value.nbytes for value in packing_of(name).pack_linear(weight, dtype).values())
        linear = LinearPlan(name="linear", out_features=64, in_features=96, scheme=scheme)
        assert linear_bytes(name, linear, NAMES[dtype]) == written


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-9, 1e-6, 1e-3, 1.0, 1e3])
def test_weights_of_any_magnitude_are_stored_as_they_were_rounded(
    magnitude: float, dtype: torch.dtype
) -> None:
    """AWQ and GPTQ store scales in float16 whatever the model's dtype, compressed-tensors in that dtype."""
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1)) * magnitude
    for name, symmetric in (("awq", False), ("gptq", True), ("compressed-tensors", False)):
        scheme = Scheme(bits=4, group_size=64, symmetric=symmetric)
        rounded = round_nearest(weight, min_max_grid(grouped_view(weight, scheme), scheme, dtype), scheme)
        packing = packing_of(name)  # type: ignore[arg-type]
        stored = packing.pack_linear(rounded, dtype)
        assert packing.unpack_linear(stored, {}, scheme).equals(rounded.packed())
