"""Attention of one new token per row in Triton, reading only the columns that its mask shows.

A block takes the query heads of one key/value head of one row, and a share of the columns: few rows leave
most of a GPU idle otherwise. Columns go by in blocks; one in which nothing is shown is not read. The shares'
maxima, sums and values are joined by a second kernel, in a fixed order (as FlashDecoding does).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_COLUMNS = 64
LEAST_HEADS = 16  # of a tensor core's product
MOST_SPLITS = 32
BLOCKS_PER_PROCESSOR = 2


@triton.jit
def shares_kernel(
    query, keys, values, mask, shares, maxima, sums,
    columns, row_stride, head_stride, value_row_stride, value_head_stride, mask_stride, scale, per_split,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row, kv_head, split = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    head, channel, value_channel = tl.arange(0, HEADS), tl.arange(0, SIZE), tl.arange(0, VALUE_SIZE)
    own = head < GROUP
    first = (row * KV_HEADS + kv_head) * GROUP
    q = tl.load(query + (first + head[:, None]) * SIZE + channel[None, :], mask=own[:, None], other=0.0)
    best = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    result = tl.zeros((HEADS, VALUE_SIZE), tl.float32)
    start = split * per_split
    keys += row.to(tl.int64) * row_stride + kv_head * head_stride
    values += row.to(tl.int64) * value_row_stride + kv_head * value_head_stride
    for block in range(start, tl.minimum(start + per_split, columns), BLOCK):
        column = block + tl.arange(0, BLOCK)
        shown = tl.load(mask + row * mask_stride + column, mask=column < columns, other=0) != 0
        if tl.max(shown.to(tl.int32), 0) > 0:
            k = tl.load(keys + column[:, None] * SIZE + channel[None, :], mask=shown[:, None], other=0.0)
            v = tl.load(
                values + column[:, None] * VALUE_SIZE + value_channel[None, :], mask=shown[:, None], other=0.0
            )
            if UPCAST:
                scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee") * scale
            else:
                scores = tl.dot(q, tl.trans(k)) * scale
            scores = tl.where(shown[None, :], scores, float("-inf"))
            highest = tl.maximum(best, tl.max(scores, 1))
            shrink = tl.exp(best - highest)
            weights = tl.exp(scores - highest[:, None])
            total = total * shrink + tl.sum(weights, 1)
            if UPCAST:
                added = tl.dot(weights, v.to(tl.float32), input_precision="ieee")
            else:
                added = tl.dot(weights.to(v.dtype), v)
            result = result * shrink[:, None] + added
            best = highest
    at = (first + head) * SPLITS + split
    tl.store(maxima + at, best, mask=own)
    tl.store(sums + at, total, mask=own)
    tl.store(shares + at[:, None] * VALUE_SIZE + value_channel[None, :], result, mask=own[:, None])


@triton.jit
def join_kernel(
    shares, maxima, sums, output, SPLITS: tl.constexpr, VALUE_SIZE: tl.constexpr
):  # fmt: skip
    head, split, channel = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, VALUE_SIZE)
    at = head * SPLITS + split
    best = tl.load(maxima + at)
    weights = tl.exp(best - tl.max(best, 0))
    total = tl.sum(weights * tl.load(sums + at), 0)
    parts = tl.load(shares + at[:, None] * VALUE_SIZE + channel[None, :])
    result = tl.sum(parts * weights[:, None], 0) / total
    tl.store(output + head * VALUE_SIZE + channel, result.to(output.dtype.element_ty))


def splits_of(blocks: int, columns: int, processors: int) -> int:
    """Shares of the columns, a power of two: enough for all processors, a block of columns each at least."""
    enough = BLOCKS_PER_PROCESSOR * processors
    most = min(MOST_SPLITS, -(-columns // BLOCK_COLUMNS))
    splits = 1
    while splits * 2 <= most and splits * blocks < enough:
        splits *= 2
    return splits


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, *, processors: int, upcast: bool
) -> Tensor:
    """query (rows, heads, size) over keys and values (rows, kv heads, columns, size): (rows, heads, value
    size). The bool mask (rows, columns) shows one column of each row at least.
    """
    rows, kv_heads, columns, size = keys.shape
    group, value_size = query.shape[1] // kv_heads, values.shape[3]
    splits = splits_of(rows * kv_heads, columns, processors)
    per_split = -(-columns // (splits * BLOCK_COLUMNS)) * BLOCK_COLUMNS
    heads = rows * query.shape[1]
    numbers = {"dtype": torch.float32, "device": query.device}
    shares = torch.empty(heads, splits, value_size, **numbers)  # type: ignore[call-overload]
    maxima, sums = torch.empty(2, heads, splits, **numbers)  # type: ignore[call-overload]
    shares_kernel[(rows * kv_heads, splits)](
        query.contiguous(), keys, values, mask, shares, maxima, sums,
        columns, keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), mask.stride(0), scale,
        per_split, KV_HEADS=kv_heads, GROUP=group,
        HEADS=max(LEAST_HEADS, triton.next_power_of_2(group)), SIZE=size, VALUE_SIZE=value_size,
        BLOCK=BLOCK_COLUMNS, SPLITS=splits, UPCAST=upcast,
    )  # fmt: skip
    output = torch.empty(rows, query.shape[1], value_size, dtype=query.dtype, device=query.device)
    join_kernel[(heads,)](shares, maxima, sums, output, SPLITS=splits, VALUE_SIZE=value_size)
    return output
