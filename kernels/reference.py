"""The slow, obvious truth of each operator, in float64 and without any of the fast paths' code."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.weight import PackedWeight

WORD_BITS = 32


def pack(values: Tensor, bits: int) -> Tensor:
    """uint8 (rows, n) to int32 words: value i at bits i*b .. i*b+b-1 of its row, read as one long integer."""
    words = -(-values.shape[1] * bits // WORD_BITS)
    packed = torch.zeros(values.shape[0], words, dtype=torch.int64)
    for row, channel in enumerate(values.tolist()):
        stream = sum(value << (index * bits) for index, value in enumerate(channel))
        for word in range(words):
            packed[row, word] = (stream >> (word * WORD_BITS)) & 0xFFFFFFFF
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`."""
    values = torch.zeros(words.shape[0], count, dtype=torch.uint8)
    for row, channel in enumerate(words.tolist()):
        stream = sum((word & 0xFFFFFFFF) << (index * WORD_BITS) for index, word in enumerate(channel))
        for index in range(count):
            values[row, index] = (stream >> (index * bits)) & (2**bits - 1)
    return values


def dequantize(weight: PackedWeight) -> Tensor:
    """float64 (out_features, in_features)."""
    q = unpack(weight.qweight.cpu(), weight.bits, weight.in_features).double()
    scale = weight.scale.cpu().double().repeat_interleave(weight.channels_per_group, dim=1)
    zero = torch.full_like(scale, 2 ** (weight.bits - 1))
    if weight.zero is not None:
        zero = weight.zero.cpu().double().repeat_interleave(weight.channels_per_group, dim=1)
    return (q - zero) * scale


def quantized_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """float64 (..., out_features)."""
    output: Tensor = x.cpu().double() @ dequantize(weight).T
    if bias is not None:
        output += bias.cpu().double()
    return output
