"""The layout of kernels/csrc/cpu/linear.cpp: how weights are repacked when they are loaded.

Rows are filled up to 64 and channels to chunks of 128, with scales of 0 for what is filled.
"""

from __future__ import annotations

from collections.abc import Callable
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
LANE_ORDER = (0, 2, 1, 3)  # of four channels in a lane


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
    in_lanes: bool = False

    @property
    def packed_bytes(self) -> int:
        tensors = [self.codes, self.scale, *([] if self.zero is None else [self.zero])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def groups_per_chunk(group_size: int) -> int:
    """0: one group for the whole row."""
    return 0 if group_size == -1 else CHUNK // group_size


def to_blocks(weight: PackedWeight, *, in_lanes: bool = False) -> BlockedWeight:
    """The weight in blocks; `in_lanes` for kernels/csrc/cpu/lanes.h alone."""
    q = unpack_rows(weight.qweight, weight.bits, weight.in_features)
    rows, channels = -(-q.shape[0] // FILL_ROWS) * FILL_ROWS, -(-q.shape[1] // CHUNK) * CHUNK
    groups = 1 if weight.group_size == -1 else channels // weight.group_size
    planes = lanes_of if in_lanes else words_of
    return BlockedWeight(
        codes=to_planes(filled(q, rows, channels), weight.bits, planes),
        scale=blocked(filled(weight.scale, rows, groups)),
        zero=None if weight.zero is None else blocked(filled(weight.zero, rows, groups)),
        bits=weight.bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
        out_features=weight.out_features,
        in_lanes=in_lanes,
    )


def filled(values: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, columns - values.shape[1], 0, rows - values.shape[0]))


def blocked(values: Tensor) -> Tensor:
    """(rows, groups) to (blocks, groups, 16)."""
    return values.view(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()


def to_planes(q: Tensor, bits: int, plane_of: Callable[[Tensor], Tensor]) -> Tensor:
    """uint8 (rows, channels) to (blocks, chunks, 16, planes, 64)."""
    digits = [q & 15, q >> DIGIT_BITS] if bits > DIGIT_BITS else [q]
    planes = [plane_of(digit.view(q.shape[0] // ROWS, ROWS, q.shape[1] // CHUNK, CHUNK)) for digit in digits]
    return torch.stack(planes, dim=3).contiguous()


def words_of(digit: Tensor) -> Tensor:
    """(blocks, 16, chunks, 128) to (blocks, chunks, 16 rows, 64)."""
    blocks, rows, chunks, _ = digit.shape
    quarters = digit.transpose(1, 2).reshape(blocks, chunks, rows, 4, WORDS)
    low = quarters[..., 0, :] | quarters[..., 1, :] << DIGIT_BITS
    high = quarters[..., 2, :] | quarters[..., 3, :] << DIGIT_BITS
    return torch.stack((low, high), dim=-1).flatten(-2)  # a word's low byte comes first


def lanes_of(digit: Tensor) -> Tensor:
    """(blocks, 16, chunks, 128) to (blocks, chunks, 16, 64): sixteen entries of all rows' bytes."""
    # Halves of a chunk, quarters of a half, fours of channels.
    fours = digit.reshape(*digit.shape[:3], 2, 2, 8, 4)[..., list(LANE_ORDER)]
    both: Tensor = fours[..., 0, :, :] | fours[..., 1, :, :] << DIGIT_BITS
    return both.permute(0, 2, 3, 4, 1, 5).flatten(4).flatten(2, 3)
