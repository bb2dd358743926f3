"""Linears of served models: from each file format to outputs."""

from __future__ import annotations

import pytest
import torch

from app.core.formats.file_format import Scheme
from app.core.formats.registry import FormatName
from kernels.layouts import packed_words
from tests.unit.kernels.weights import random_weight
from workers.formats.packings import packing_of
from workers.modeling.quantized_linear import quantized_linear
from workers.modeling.quantized_weight import QuantizedWeight

CPU = torch.device("cpu")


def random_quantized(scheme: Scheme, out_features: int = 64, in_features: int = 128) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    levels, groups = 2**scheme.bits, scheme.groups(in_features)
    q = torch.randint(0, levels, (out_features, in_features), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, levels, (out_features, groups), generator=generator, dtype=torch.uint8)
    if scheme.symmetric:
        zero = torch.full_like(zero, levels // 2)
    scale = torch.rand(out_features, groups, generator=generator).to(torch.float16).float() / levels
    return QuantizedWeight(q, scale, zero, scheme)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("awq", Scheme(bits=4, group_size=64, symmetric=False)),
        ("gptq", Scheme(bits=3, group_size=32, symmetric=True)),
        ("gptq", Scheme(bits=8, group_size=-1, symmetric=True)),
        ("compressed-tensors", Scheme(bits=3, group_size=64, symmetric=False)),
        ("compressed-tensors", Scheme(bits=4, group_size=128, symmetric=True)),
        ("compressed-tensors", Scheme(bits=2, group_size=-1, symmetric=False)),
    ],
)
def test_every_format_becomes_a_linear(name: FormatName, scheme: Scheme) -> None:
    weight = random_quantized(scheme)
    packing = packing_of(name)
    packed = packing.unpack_linear(packing.pack_linear(weight, torch.float16), {})
    assert (packed.zero is None) == scheme.symmetric
    bias = torch.randn(64)
    linear = quantized_linear(packed, dtype=torch.float32, device=CPU, bias=bias, requested="torch")
    x = torch.randn(2, 3, 128)
    expected = torch.nn.functional.linear(x, weight.dequantize(), bias)
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)
    words = 4 * 64 * packed_words(128, scheme.bits)
    scales = 64 * scheme.groups(128) * (2 if scheme.symmetric else 3)
    assert linear.packed_bytes == words + scales + 64 * 4


def test_it_says_what_it_is_and_who_computes() -> None:
    packed = random_weight(64, 128, group_size=64)
    linear = quantized_linear(packed, dtype=torch.bfloat16, device=CPU, requested="torch")
    assert "bits=4, group_size=64, bias=False, backend=torch" in repr(linear)
    assert str(linear.selection) == "torch (asked for)"
    with pytest.raises(TypeError, match=r"x is torch.float32; allowed: torch.bfloat16"):
        linear(torch.zeros(1, 128))
    with pytest.raises(ValueError, match=r"x has shape \(1, 64\); allowed: \(..., 128\)"):
        linear(torch.zeros(1, 64, dtype=torch.bfloat16))


def test_a_backend_that_cannot_is_an_error() -> None:
    packed = random_weight(64, 128, group_size=64)
    with pytest.raises(ValueError, match="no kernel backend 'nothing' for cpu"):
        quantized_linear(packed, dtype=torch.bfloat16, device=CPU, requested="nothing")


def test_a_bias_of_another_size_is_refused() -> None:
    packed = random_weight(64, 128, group_size=64)
    with pytest.raises(ValueError, match=r"bias has shape \(63,\); allowed: \(64,\)"):
        quantized_linear(packed, dtype=torch.bfloat16, device=CPU, bias=torch.zeros(63))
