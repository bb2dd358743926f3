"""Bit layouts of packed integers, as data, with pack next to unpack.

Dense packing puts value i at bits i*b .. i*b+b-1 of one stream of 32-bit words, least significant bit
first; for 3 bits a value may straddle two words. Sources: AutoAWQ `packing_utils.py` (interleaved nibbles),
compressed-tensors `pack_quantized` (dense, since October 2025), GPTQ `quant.py` (dense down the columns).
The same stream in bytes is what little-endian machines hold, so packing works on bytes: an eighth of the
memory that integers wide enough for a word would take. Those who pack call the operators, which leave tensors
on a GPU to its kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD_BITS = 32
BYTE_BITS = 8

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
    period, width = byte_period(bits)
    blocks = -(-count // period)
    padded = torch.nn.functional.pad(values, (0, blocks * period - count)).view(rows, blocks, period)
    packed = torch.zeros(rows, blocks, width, dtype=torch.uint8, device=values.device)
    for index in range(period):
        byte, shift = divmod(index * bits, BYTE_BITS)
        packed[..., byte] |= padded[..., index] << shift
        if shift + bits > BYTE_BITS:
            packed[..., byte + 1] |= padded[..., index] >> (BYTE_BITS - shift)
    size = 4 * packed_words(count, bits)  # bytes beyond are the padding's
    flat = packed.view(rows, blocks * width)
    exact = torch.nn.functional.pad(flat, (0, size - flat.shape[1])).contiguous()
    return exact.view(-1).view(torch.int32).view(rows, size // 4)


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_rows`: int32 (rows, words) to uint8 (rows, count)."""
    rows = words.shape[0]
    period, width = byte_period(bits)
    blocks = -(-count // period)
    # Flat in between: a single column is contiguous with any stride, and then can't be seen as bytes.
    stored = words.contiguous().view(-1).view(torch.uint8).view(rows, 4 * words.shape[1])
    packed = torch.nn.functional.pad(stored, (0, blocks * width - stored.shape[1])).view(rows, blocks, width)
    values = torch.empty(rows, blocks, period, dtype=torch.uint8, device=words.device)
    for index in range(period):
        byte, shift = divmod(index * bits, BYTE_BITS)
        value = packed[..., byte] >> shift
        if shift + bits > BYTE_BITS:
            value |= packed[..., byte + 1] << (BYTE_BITS - shift)
        torch.bitwise_and(value, 2**bits - 1, out=values[..., index])
    return values.view(rows, blocks * period)[:, :count].contiguous()


def byte_period(bits: int) -> tuple[int, int]:
    """Values after which bytes and values align again, and the bytes that they take."""
    period = BYTE_BITS // math.gcd(bits, BYTE_BITS)
    return period, period * bits // BYTE_BITS


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


def to_stored_zeros(zeros: Tensor) -> Tensor:
    """uint8 zero points 1..2^bits-1 as GPTQ's first version stores them, before they are packed.

    Raises ValueError for a zero point of 0: less one it has no place in its bits.
    """
    if zeros.numel() and int(zeros.min()) < GPTQ_ZERO_OFFSET:
        raise ValueError("to_stored_zeros: a zero point of 0 cannot be stored less one")
    return zeros - GPTQ_ZERO_OFFSET


def from_stored_zeros(stored: Tensor) -> Tensor:
    """The inverse of `to_stored_zeros`."""
    return stored + GPTQ_ZERO_OFFSET
