"""Bit layouts of packed integers, as data, with pack next to unpack.

Dense packing puts value i at bits i*b .. i*b+b-1 of one stream of 32-bit words, least significant bit
first; for 3 bits a value may straddle two words. Sources: AutoAWQ `packing_utils.py` (interleaved nibbles),
compressed-tensors `pack_quantized` (dense, since October 2025), GPTQ `quant.py` (dense down the columns).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD_BITS = 32

# AutoAWQ: nibble k of a word holds output channel AWQ_ORDER[k] of its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ_POSITION = tuple(AWQ_ORDER.index(channel) for channel in range(len(AWQ_ORDER)))

# GPTQ v1 stores zero points less one, and its kernels add it again.
GPTQ_ZERO_OFFSET = 1


def packed_words(values: int, bits: int) -> int:
    """32-bit words that hold `values` integers of `bits` bits."""
    return -(-values * bits // WORD_BITS)


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """uint8 (rows, n) with values below 2^bits, to int32 (rows, ceil(n * bits / 32)).

    Raises ValueError for a value that does not fit: it would change its neighbour.
    """
    if values.numel() and int(values.max()) >= 2**bits:
        raise ValueError(f"pack_rows: value {int(values.max())} does not fit {bits} bits")
    rows, count = values.shape
    period = WORD_BITS // math.gcd(bits, WORD_BITS)  # values after which words and values align again
    padded = torch.nn.functional.pad(values, (0, -count % period)).view(rows, -1, period).to(torch.int64)
    words = torch.zeros(
        rows, padded.shape[1], period * bits // WORD_BITS, dtype=torch.int64, device=values.device
    )
    for index in range(period):
        word, shift = divmod(index * bits, WORD_BITS)
        words[..., word] |= padded[..., index] << shift
        if shift + bits > WORD_BITS:
            words[..., word + 1] |= padded[..., index] >> (WORD_BITS - shift)
    return to_int32(words).view(rows, -1)[:, : packed_words(count, bits)].contiguous()


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_rows`: int32 (rows, words) to uint8 (rows, count)."""
    period = WORD_BITS // math.gcd(bits, WORD_BITS)
    per_period = period * bits // WORD_BITS
    rows = words.shape[0]
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    blocks = torch.nn.functional.pad(unsigned, (0, -words.shape[1] % per_period)).view(rows, -1, per_period)
    values = torch.empty(rows, blocks.shape[1], period, dtype=torch.uint8, device=words.device)
    for index in range(period):
        word, shift = divmod(index * bits, WORD_BITS)
        value = blocks[..., word] >> shift
        if shift + bits > WORD_BITS:
            value |= blocks[..., word + 1] << (WORD_BITS - shift)
        values[..., index] = (value & (2**bits - 1)).to(torch.uint8)
    return values.view(rows, -1)[:, :count].contiguous()


def pack_awq(values: Tensor) -> Tensor:
    """uint8 (rows, n) of nibbles, n a multiple of 8, to int32 (rows, n / 8) in AutoAWQ's order."""
    order = torch.tensor(AWQ_ORDER, device=values.device)
    return pack_rows(values.view(values.shape[0], -1, 8)[..., order].reshape(values.shape), 4)


def unpack_awq(words: Tensor) -> Tensor:
    """The inverse of `pack_awq`: int32 (rows, n) to uint8 (rows, 8 n)."""
    position = torch.tensor(AWQ_POSITION, device=words.device)
    nibbles = unpack_rows(words, 4, words.shape[1] * 8)
    return nibbles.view(words.shape[0], -1, 8)[..., position].reshape(nibbles.shape)


def pack_gptq(values: Tensor, bits: int) -> Tensor:
    """uint8 (n, columns) to int32 (ceil(n * bits / 32), columns): dense down each column."""
    return pack_rows(values.T.contiguous(), bits).T.contiguous()


def unpack_gptq(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_gptq`: int32 (words, columns) to uint8 (count, columns)."""
    return unpack_rows(words.T.contiguous(), bits, count).T.contiguous()


def pack_gptq_zeros(zeros: Tensor, bits: int) -> Tensor:
    """uint8 (groups, n) of zero points 1..2^bits-1, to int32 (groups, ceil(n * bits / 32)).

    Raises ValueError for a zero point of 0: less one it has no place in its bits.
    """
    if zeros.numel() and int(zeros.min()) < GPTQ_ZERO_OFFSET:
        raise ValueError("pack_gptq_zeros: a zero point of 0 cannot be stored less one")
    return pack_rows(zeros - GPTQ_ZERO_OFFSET, bits)


def unpack_gptq_zeros(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_gptq_zeros`: int32 (groups, words) to uint8 (groups, count)."""
    return unpack_rows(words, bits, count) + GPTQ_ZERO_OFFSET


def to_int32(words: Tensor) -> Tensor:
    """int64 in 0..2^32-1 to int32 with the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
