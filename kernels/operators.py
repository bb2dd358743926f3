"""Operators on the canonical layout, registered as `torch.ops.nibble.*`, with fakes.

The bodies are PyTorch's own operators and run on any device; a backend may register a faster body for its
device (`pack.register_kernel`). kernels/reference.py is the slow truth of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import layouts
from kernels.checks import (
    BITS,
    DTYPES,
    check_bias,
    check_contiguous,
    check_dtype,
    check_input,
    check_one_of,
    check_packed,
)


@torch.library.custom_op("nibble::pack", mutates_args=())
def pack(values: Tensor, bits: int) -> Tensor:
    """uint8 (rows, n) to int32 (rows, ceil(n * bits / 32)): layouts.pack_rows."""
    check_values(values, bits)
    return layouts.pack_rows(values, bits)


@pack.register_fake
def _(values: Tensor, bits: int) -> Tensor:
    check_values(values, bits)
    rows, count = values.shape
    return values.new_empty((rows, layouts.packed_words(count, bits)), dtype=torch.int32)


@torch.library.custom_op("nibble::unpack", mutates_args=())
def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 (rows, ceil(count * bits / 32)) to uint8 (rows, count): layouts.unpack_rows."""
    check_words(words, bits, count)
    return layouts.unpack_rows(words, bits, count)


@unpack.register_fake
def _(words: Tensor, bits: int, count: int) -> Tensor:
    check_words(words, bits, count)
    return words.new_empty((words.shape[0], count), dtype=torch.uint8)


@torch.library.custom_op("nibble::dequantize", mutates_args=())
def dequantize(
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of a PackedWeight's tensors: `dtype` (out_features, in_features), rounded once."""
    check_packed(qweight, scale, zero, bits, group_size, in_features)
    check_dtype("dtype", dtype, DTYPES)
    return dequantize_in_torch(qweight, scale, zero, bits, in_features, dtype)


def dequantize_in_torch(
    qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """`dequantize` of checked tensors, in PyTorch's own operators."""
    rows, groups = scale.shape
    q = layouts.unpack_rows(qweight, bits, in_features).view(rows, groups, -1)
    # In float32 the difference is exact and the product is rounded once before it is rounded to dtype.
    weight = q.to(torch.float32)
    weight -= 2 ** (bits - 1) if zero is None else zero.to(torch.float32)[..., None]
    weight *= scale.to(torch.float32)[..., None]
    return weight.view(rows, in_features).to(dtype)


@dequantize.register_fake
def _(
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    check_packed(qweight, scale, zero, bits, group_size, in_features)
    check_dtype("dtype", dtype, DTYPES)
    return scale.new_empty((qweight.shape[0], in_features), dtype=dtype)


@torch.library.custom_op("nibble::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """x (..., in_features) to (..., out_features), from a PackedWeight's tensors."""
    check_linear(x, qweight, scale, zero, bias, bits, group_size)
    weight = dequantize(qweight, scale, zero, bits, group_size, x.shape[-1], x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


@quantized_linear.register_fake
def _(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    check_linear(x, qweight, scale, zero, bias, bits, group_size)
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def check_values(values: Tensor, bits: int) -> None:
    check_one_of("bits", bits, BITS)
    check_dtype("values", values.dtype, (torch.uint8,))
    if values.dim() != 2:
        raise ValueError(f"values has {values.dim()} dimensions; allowed: 2")


def check_words(words: Tensor, bits: int, count: int) -> None:
    check_one_of("bits", bits, BITS)
    check_dtype("words", words.dtype, (torch.int32,))
    if words.dim() != 2 or count < 0 or words.shape[1] != layouts.packed_words(count, bits):
        allowed = f"(rows, {layouts.packed_words(max(count, 0), bits)}) for count={count}, bits={bits}"
        raise ValueError(f"words has shape {tuple(words.shape)}; allowed: {allowed}")
    check_contiguous("words", words)


def check_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> None:
    check_dtype("x", x.dtype, DTYPES)
    if x.dim() == 0:
        raise ValueError("x has shape (); allowed: (..., in_features)")
    check_packed(qweight, scale, zero, bits, group_size, x.shape[-1])
    check_input(x, x.shape[-1], x.dtype, qweight.device)
    check_bias(bias, qweight.shape[0], x)
