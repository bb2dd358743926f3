"""The registered operators: against the reference, through opcheck, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import layouts, operators, reference
from kernels.cuda import packing
from kernels.weight import PackedWeight
from tests.unit.kernels.weights import assert_close, random_input, random_weight

BITS = st.sampled_from([2, 3, 4, 8])
SCHEMES = [(2, 32), (3, 64), (4, 128), (8, -1)]


def arguments(weight: PackedWeight) -> tuple[Any, ...]:
    return weight.qweight, weight.scale, weight.zero


@settings(max_examples=40, deadline=None)
@given(bits=BITS, rows=st.integers(0, 5), count=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_packing_is_the_references(bits: int, rows: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (rows, count), generator=generator, dtype=torch.uint8)
    words = operators.pack(values, bits)
    assert torch.equal(words, reference.pack(values, bits))
    assert torch.equal(operators.unpack(words, bits, count), values)
    assert torch.equal(reference.unpack(words, bits, count), values)


@settings(max_examples=20, deadline=None)
@given(bits=BITS, rows=st.integers(1, 5), count=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_packing_down_is_packing_of_the_columns(bits: int, rows: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (count, rows), generator=generator, dtype=torch.uint8)
    words = operators.pack(values, bits, down=True)
    assert torch.equal(words, reference.pack(values.T, bits).T)
    assert torch.equal(operators.unpack(words, bits, count, down=True), values)


def test_interleaved_packing_is_that_of_awq() -> None:
    values = torch.arange(48, dtype=torch.uint8).view(3, 16) % 16
    words = operators.pack(values, 4, interleaved=True)
    assert torch.equal(words, layouts.pack_awq(values))
    assert torch.equal(operators.unpack(words, 4, 16, interleaved=True), values)


def test_tensors_that_the_kernels_take_are_packed_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for a kernel, and for which layout, is seen without a GPU; its bytes are tested on one."""
    asked: list[tuple[Any, ...]] = []

    def kernel(name: str) -> Callable[..., torch.Tensor]:
        def call(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            asked.append((name, *arguments, *options.values()))
            return torch.zeros_like(tensor)

        return call

    monkeypatch.setattr(packing, "takes", lambda operator, tensor: True)
    for name in ("pack", "unpack", "dequantize"):
        monkeypatch.setattr(packing, name, kernel(name))
    values, natural = torch.zeros(8, 8, dtype=torch.uint8), packing.NATURAL_ORDER
    operators.pack(values, 3)
    operators.pack(values, 4, down=True)
    operators.pack(values, 4, interleaved=True)
    words = torch.zeros(8, 1, dtype=torch.int32)
    operators.unpack(words, 4, 8)
    operators.unpack(words, 4, 64, down=True)
    operators.unpack(words, 4, 8, interleaved=True)
    assert asked == [
        ("pack", 3, False, natural), ("pack", 4, True, natural), ("pack", 4, False, layouts.AWQ_ORDER),
        ("unpack", 4, 8, False, natural), ("unpack", 4, 64, True, natural),
        ("unpack", 4, 8, False, layouts.AWQ_ORDER),
    ]  # fmt: skip
    weight = random_weight(4, 32, group_size=32)
    operators.dequantize(*arguments(weight), 4, 32, 32, torch.float16)
    assert asked[-1][0] == "dequantize"


@settings(max_examples=30, deadline=None)
@given(
    bits=BITS,
    group=st.sampled_from([32, 64, 128, -1]),
    groups=st.integers(1, 3),
    rows=st.integers(1, 9),
    asymmetric=st.booleans(),
)
def test_dequantizing_is_the_references(
    bits: int, group: int, groups: int, rows: int, asymmetric: bool
) -> None:
    in_features = groups * 7 if group == -1 else groups * group
    weight = random_weight(rows, in_features, bits=bits, group_size=group, asymmetric=asymmetric)
    found = operators.dequantize(*arguments(weight), bits, group, in_features, torch.float32)
    assert torch.equal(found.double(), reference.dequantize(weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "group"), SCHEMES)
def test_the_linear_is_the_references(bits: int, group: int, dtype: torch.dtype) -> None:
    weight = random_weight(24, 256, bits=bits, group_size=group, asymmetric=True)
    x, bias = random_input((2, 3, 256), dtype), random_input((24,), dtype)
    output = operators.quantized_linear(x, *arguments(weight), bias, bits, group)
    assert_close(output, x, weight, bias)


def test_opcheck() -> None:
    values = torch.randint(0, 8, (5, 64), dtype=torch.uint8)
    torch.library.opcheck(operators.pack, (values, 3))
    torch.library.opcheck(operators.unpack, (operators.pack(values, 3), 3, 64))
    torch.library.opcheck(operators.pack, (values, 3, True))
    torch.library.opcheck(operators.unpack, (operators.pack(values, 3, down=True), 3, 5, True))
    torch.library.opcheck(operators.pack, (values, 4, False, True))
    torch.library.opcheck(operators.unpack, (operators.pack(values, 4, interleaved=True), 4, 64, False, True))
    weight = random_weight(16, 128, bits=3, group_size=64, asymmetric=True)
    torch.library.opcheck(operators.dequantize, (*arguments(weight), 3, 64, 128, torch.bfloat16))
    bias = torch.zeros(16)
    for added in (bias, None):
        x = random_input((4, 128), torch.float32)
        torch.library.opcheck(operators.quantized_linear, (x, *arguments(weight), added, 3, 64))
    symmetric = random_weight(16, 128, bits=3, group_size=64)
    torch.library.opcheck(operators.quantized_linear, (x, *arguments(symmetric), None, 3, 64))


WEIGHT = random_weight(16, 128, group_size=64, asymmetric=True)
X = random_input((4, 128), torch.float32)
CALL = {
    "x": X, "qweight": WEIGHT.qweight, "scale": WEIGHT.scale, "zero": WEIGHT.zero, "bias": torch.zeros(16),
    "bits": 4, "group_size": 64,
}  # fmt: skip
BAD = [
    ({"x": X.double()}, TypeError, "x is torch.float64; allowed: torch.float16"),
    ({"x": X[:, :64].contiguous()}, ValueError, r"qweight has shape \(16, 16\); allowed: \(16, 8\)"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\); allowed"),
    ({"x": X.to("meta")}, ValueError, "x is on meta; allowed: cpu"),
    ({"qweight": WEIGHT.qweight.long()}, TypeError, "qweight is torch.int64; allowed: torch.int32"),
    ({"qweight": WEIGHT.qweight[0]}, ValueError, "qweight has 1 dimensions; allowed: 2"),
    ({"qweight": WEIGHT.qweight.T.contiguous().T}, ValueError, r"qweight has strides \(1, 16\)"),
    ({"scale": WEIGHT.scale.double()}, TypeError, "scale is torch.float64"),
    ({"scale": WEIGHT.scale[:, :1].contiguous()}, ValueError, r"scale has shape \(16, 1\)"),
    ({"scale": WEIGHT.scale.T.contiguous().T}, ValueError, "scale has strides"),
    ({"scale": WEIGHT.scale.to("meta")}, ValueError, "scale is on meta; allowed: cpu"),
    ({"zero": WEIGHT.scale.to(torch.uint8).to("meta")}, ValueError, "zero is on meta; allowed: cpu"),
    ({"zero": torch.zeros(2, 16, dtype=torch.uint8).T}, ValueError, "zero has strides"),
    ({"bias": torch.zeros(16, device="meta")}, ValueError, "bias is on meta; allowed: cpu"),
    ({"zero": WEIGHT.scale}, TypeError, "zero is torch.float16; allowed: torch.uint8"),
    ({"zero": WEIGHT.qweight[:, :1].to(torch.uint8)}, ValueError, r"zero has shape \(16, 1\)"),
    ({"bias": torch.zeros(15)}, ValueError, r"bias has shape \(15,\); allowed: \(16,\)"),
    ({"bias": torch.zeros(16, dtype=torch.float16)}, TypeError, "bias is torch.float16; allowed: torch.fl"),
    ({"bits": 5}, ValueError, "bits=5; allowed: 2, 3, 4, 8"),
    ({"group_size": 48}, ValueError, "group_size=48; allowed: 32, 64, 128, -1"),
    ({"group_size": 32}, ValueError, r"scale has shape \(16, 2\); allowed: \(16, 4\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        operators.quantized_linear(**{**CALL, **change})


def test_bad_arguments_of_packing_are_named() -> None:
    values = torch.zeros(2, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bits=7; allowed"):
        operators.pack(values, 7)
    with pytest.raises(TypeError, match=r"values is torch.int32; allowed: torch.uint8"):
        operators.pack(values.int(), 4)
    with pytest.raises(ValueError, match="values has 1 dimensions"):
        operators.pack(values[0], 4)
    with pytest.raises(ValueError, match="value 9 does not fit 3 bits"):
        operators.pack(values + 9, 3)
    with pytest.raises(ValueError, match=r"words has shape \(2, 1\); allowed: \(rows, 2\) for count=9"):
        operators.unpack(operators.pack(values, 4), 4, 9)
    with pytest.raises(ValueError, match=r"words has shape \(2, 1\); allowed: \(1, columns\) for count=8"):
        operators.unpack(operators.pack(values, 4), 4, 8, down=True)
    with pytest.raises(ValueError, match=r"words has strides \(1, 2\)"):
        operators.unpack(torch.zeros(2, 2, dtype=torch.int32).T, 4, 16)
    for bits, down, shape in ((8, False, (2, 8)), (4, True, (2, 8)), (4, False, (2, 12))):
        with pytest.raises(ValueError, match=f"interleaved with bits={bits}, down={down} and {shape[1]} val"):
            operators.pack(values.new_zeros(shape), bits, down=down, interleaved=True)
    with pytest.raises(TypeError, match=r"dtype is torch.float64"):
        operators.dequantize(WEIGHT.qweight, WEIGHT.scale, WEIGHT.zero, 4, 64, 128, torch.float64)


def test_indivisible_channels_are_named() -> None:
    with pytest.raises(ValueError, match="in_features=100; allowed: multiples of group_size=64"):
        PackedWeight(WEIGHT.qweight, WEIGHT.scale, None, 4, 64, 100)
