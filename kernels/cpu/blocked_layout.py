"""The layout of kernels/csrc/cpu/linear.cpp: how weights are repacked when they are loaded.

Rows are filled up to 64 and channels to chunks of 128, with scales of 0 for what is filled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layouts import unpack_rows
from kernels.weight import PackedWeight

ROWS = 16  # of a block
FILL_ROWS = 64  # four blocks are multiplied at once
CHUNK = 128  # channels
WORDS = 32  # 16-bit words of a plane: word j holds channels j, 32 + j, 64 + j and 96 + j
DIGIT_BITS = 4


@dataclass(frozen=True)
class BlockedWeight:
    """A packed weight in blocks. Sizes are those of the original."""

    codes: Tensor  # uint8 (blocks, chunks, 16, planes, 64)
    scale: Tensor  # as packed (blocks, groups, 16)
    zero: Tensor | None  # uint8 (blocks, groups, 16)
    bits: int
    group_size: int
    in_features: int
    out_features: int

    @property
    def packed_bytes(self) -> int:
        tensors = [self.codes, self.scale, *([] if self.zero is None else [self.zero])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def groups_per_chunk(group_size: int) -> int:
    """0: one group for the whole row."""
    return 0 if group_size == -1 else CHUNK // group_size


def to_blocks(weight: PackedWeight) -> BlockedWeight:
    q = unpack_rows(weight.qweight, weight.bits, weight.in_features)
    rows, channels = -(-q.shape[0] // FILL_ROWS) * FILL_ROWS, -(-q.shape[1] // CHUNK) * CHUNK
    groups = 1 if weight.group_size == -1 else channels // weight.group_size
    return BlockedWeight(
        codes=to_planes(filled(q, rows, channels), weight.bits),
        scale=blocked(filled(weight.scale, rows, groups)),
        zero=None if weight.zero is None else blocked(filled(weight.zero, rows, groups)),
        bits=weight.bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
        out_features=weight.out_features,
    )


def filled(values: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, columns - values.shape[1], 0, rows - values.shape[0]))


def blocked(values: Tensor) -> Tensor:
    """(rows, groups) to (blocks, groups, 16)."""
    return values.view(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()


def to_planes(q: Tensor, bits: int) -> Tensor:
    """uint8 (rows, channels) to (blocks, chunks, 16, planes, 64)."""
    digits = [q & 15, q >> DIGIT_BITS] if bits > DIGIT_BITS else [q]
    planes = []
    for digit in digits:
        quarters = digit.view(q.shape[0] // ROWS, ROWS, q.shape[1] // CHUNK, 4, WORDS)
        low = quarters[..., 0, :] | quarters[..., 1, :] << DIGIT_BITS
        high = quarters[..., 2, :] | quarters[..., 3, :] << DIGIT_BITS
        planes.append(torch.stack((low, high), dim=-1).flatten(-2))  # a word's low byte comes first
    return torch.stack(planes, dim=3).transpose(1, 2).contiguous()
