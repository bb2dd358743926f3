"""Operators on packed weights, registered as `torch.ops.nibble.*`, with fakes.

Tensors on NVIDIA GPUs are packed, unpacked and dequantized by kernels (kernels/cuda/packing.py). The other
bodies are PyTorch's own operators and run on any device. kernels/reference.py is the slow truth of each.
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
from kernels.cuda import packing


@torch.library.custom_op("nibble::pack", mutates_args=())
def pack(values: Tensor, bits: int, down: bool = False, interleaved: bool = False) -> Tensor:
    """uint8 (rows, n) to int32 (rows, ceil(n * bits / 32)): layouts.pack_rows.

    `down`: uint8 (n, columns) to int32 (ceil(n * bits / 32), columns): layouts.pack_gptq.
    `interleaved`: nibbles in AutoAWQ's order: layouts.pack_awq.
    """
    check_values(values, bits, down=down, interleaved=interleaved)
    if packing.takes("pack", values):
        return packing.pack(values, bits, down=down, order=order_of(interleaved=interleaved))
    if interleaved:
        return layouts.pack_awq(values)
    return layouts.pack_gptq(values, bits) if down else layouts.pack_rows(values, bits)


@pack.register_fake
def _(values: Tensor, bits: int, down: bool = False, interleaved: bool = False) -> Tensor:
    check_values(values, bits, down=down, interleaved=interleaved)
    rows, count = values.shape[::-1] if down else values.shape
    words = layouts.packed_words(count, bits)
    return values.new_empty((words, rows) if down else (rows, words), dtype=torch.int32)


@torch.library.custom_op("nibble::unpack", mutates_args=())
def unpack(words: Tensor, bits: int, count: int, down: bool = False, interleaved: bool = False) -> Tensor:
    """The inverse of `pack`: `count` values of each row, or of each column if `down`."""
    check_words(words, bits, count, down=down, interleaved=interleaved)
    if packing.takes("unpack", words):
        return packing.unpack(words, bits, count, down=down, order=order_of(interleaved=interleaved))
    if interleaved:
        return layouts.unpack_awq(words)
    return layouts.unpack_gptq(words, bits, count) if down else layouts.unpack_rows(words, bits, count)


@unpack.register_fake
def _(words: Tensor, bits: int, count: int, down: bool = False, interleaved: bool = False) -> Tensor:
    check_words(words, bits, count, down=down, interleaved=interleaved)
    rows = words.shape[1 if down else 0]
    return words.new_empty((count, rows) if down else (rows, count), dtype=torch.uint8)


def order_of(*, interleaved: bool) -> tuple[int, ...]:
    return layouts.AWQ_ORDER if interleaved else packing.NATURAL_ORDER


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
    if packing.takes("dequantize", qweight):
        return packing.dequantize(qweight, scale, zero, bits, in_features, dtype)
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


def check_values(values: Tensor, bits: int, *, down: bool, interleaved: bool) -> None:
    check_one_of("bits", bits, BITS)
    check_dtype("values", values.dtype, (torch.uint8,))
    if values.dim() != 2:
        raise ValueError(f"values has {values.dim()} dimensions; allowed: 2")
    check_order(bits, values.shape[1], down=down, interleaved=interleaved)


def check_words(words: Tensor, bits: int, count: int, *, down: bool, interleaved: bool) -> None:
    check_one_of("bits", bits, BITS)
    check_dtype("words", words.dtype, (torch.int32,))
    needed = layouts.packed_words(max(count, 0), bits)
    if words.dim() != 2 or count < 0 or words.shape[0 if down else 1] != needed:
        allowed = f"({needed}, columns)" if down else f"(rows, {needed})"
        raise ValueError(
            f"words has shape {tuple(words.shape)}; allowed: {allowed} for count={count}, bits={bits}"
        )
    check_contiguous("words", words)
    check_order(bits, count, down=down, interleaved=interleaved)


def check_order(bits: int, count: int, *, down: bool, interleaved: bool) -> None:
    if interleaved and (down or bits != 4 or count % 8):
        raise ValueError(
            f"interleaved with bits={bits}, down={down} and {count} values in a row; "
            "allowed: bits=4, down=False and multiples of 8"
        )


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
