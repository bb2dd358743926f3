"""y = x W^T in Triton, on the canonical packed weight.

The dequantized weight is the left operand of the product: on Hopper Triton then feeds the tensor cores from
registers. A block of output rows reads its channels in blocks that lie within one group, so that a row has
one scale and one zero point at a time. Few tokens leave most of a GPU idle, so channels are split among
blocks, whose parts are added afterwards, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.weight import PackedWeight

BLOCK_ROWS = 64
MAX_BLOCK_TOKENS = 64
MAX_BLOCK_CHANNELS = 64
MAX_SPLITS = 8


@triton.jit
def linear_kernel(
    x, qweight, scale, zero, parts,
    tokens, rows, channels, words, groups, group_size, channels_per_split,
    BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    row_mask, token_mask = row < rows, token < tokens
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    start = split * channels_per_split
    for first in range(start, tl.minimum(start + channels_per_split, channels), BLOCK_K):
        channel = first + tl.arange(0, BLOCK_K)
        channel_mask = channel < channels
        bit = channel * BITS
        mask = row_mask[:, None] & channel_mask[None, :]
        at = qweight + row[:, None].to(tl.int64) * words + (bit // 32)[None, :]
        shift = (bit % 32)[None, :]
        q = tl.load(at, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
        if BITS == 3:
            over = mask & (shift > 29)
            high = tl.load(at + 1, mask=over, other=0).to(tl.uint32, bitcast=True)
            q = q | tl.where(over, high << ((32 - shift) % 32).to(tl.uint32), 0)
        q = (q & ((1 << BITS) - 1)).to(tl.int32)
        group = first // group_size
        row_scale = tl.load(scale + row * groups + group, mask=row_mask, other=0.0).to(tl.float32)
        if ASYMMETRIC:
            row_zero = tl.load(zero + row * groups + group, mask=row_mask, other=0).to(tl.int32)
            q = q - row_zero[:, None]
        else:
            q = q - (1 << (BITS - 1))
        weight = (q.to(tl.float32) * row_scale[:, None]).to(x.dtype.element_ty)
        columns = tl.load(
            x + token[None, :].to(tl.int64) * channels + channel[:, None],
            mask=token_mask[None, :] & channel_mask[:, None],
            other=0.0,
        )
        if UPCAST:
            sums = tl.dot(weight.to(tl.float32), columns.to(tl.float32), sums, input_precision="ieee")
        else:
            sums = tl.dot(weight, columns, sums)
    target = parts + (split * tokens + token[None, :]).to(tl.int64) * rows + row[:, None]
    tl.store(target, sums, mask=row_mask[:, None] & token_mask[None, :])


def block_channels(weight: PackedWeight) -> int:
    """Channels of a block: within one group, a power of two."""
    if weight.groups == 1:
        return MAX_BLOCK_CHANNELS
    return min(weight.channels_per_group, MAX_BLOCK_CHANNELS)


def splits_of(weight: PackedWeight, tokens: int, processors: int) -> tuple[int, int]:
    """Into how many parts the channels are split, and the channels of a part."""
    blocks = -(-weight.out_features // BLOCK_ROWS) * -(-tokens // MAX_BLOCK_TOKENS)
    step = block_channels(weight)
    steps = -(-weight.in_features // step)
    splits = max(1, min(MAX_SPLITS, processors // max(blocks, 1), steps))
    channels = -(-steps // splits) * step
    return -(-weight.in_features // channels), channels


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, *, processors: int, upcast: bool) -> Tensor:
    """x (tokens, in_features), contiguous, to (tokens, out_features).

    `upcast`: multiply in float32, as float32 wants and the interpreter, whose bfloat16 product is wrong.
    """
    tokens, rows = x.shape[0], weight.out_features
    if tokens == 0:
        return x.new_empty(0, rows)
    splits, channels_per_split = splits_of(weight, tokens, processors)
    parts = torch.empty(splits, tokens, rows, dtype=torch.float32, device=x.device)
    block_tokens = min(MAX_BLOCK_TOKENS, max(16, triton.next_power_of_2(tokens)))
    grid = (-(-rows // BLOCK_ROWS), -(-tokens // block_tokens), splits)
    linear_kernel[grid](
        x, weight.qweight, weight.scale, weight.scale if weight.zero is None else weight.zero, parts,
        tokens, rows, weight.in_features, weight.qweight.shape[1], weight.groups, weight.channels_per_group,
        channels_per_split,
        BITS=weight.bits, ASYMMETRIC=weight.zero is not None, UPCAST=upcast,
        BLOCK_N=BLOCK_ROWS, BLOCK_M=block_tokens, BLOCK_K=block_channels(weight),
    )  # fmt: skip
    output = parts.sum(dim=0)
    if bias is not None:
        output += bias
    return output.to(x.dtype)
