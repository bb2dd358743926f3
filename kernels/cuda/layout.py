"""The records that the CUDA kernels read: packed weights in the order of the tensor core's fragments.

A record holds TILE_ROWS output rows by UNIT_CHANNELS input channels. In mma.m16n8k16 lane l of a warp holds,
of each 16 x 16 tile of the left operand, four pairs of neighbouring channels: pair i at row l/4 + 8 (i & 1)
and channel 2 (l % 4) + 8 (i >> 1). The words of a lane lie so that one wide load brings the fragments of a
half (64 channels), and the bits in them so that a mask brings both numbers of a pair, 16 bits apart, at once.

Records are ordered by unit of channels, then by tile of rows: neighbouring tiles are one contiguous copy.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layouts import unpack_rows
from kernels.weight import PackedWeight

TILE_ROWS = 16
UNIT_CHANNELS = 128
HALF_CHANNELS = 64
STEP_CHANNELS = 16
LANES = 32
# Where the third bit of each pair of 3-bit weights lies (csrc/cuda/fragments.cuh says why): [step][pair].
THIRD_BIT = ((2, 4, 6, 8), (3, 5, 7, 9), (10, 12, 14, 0), (11, 13, 15, 1))
# Lane l needs the scales and zero points of rows l/4 and l/4 + 8: they lie next to each other.
ROW_ORDER = tuple(row for first in range(8) for row in (first, first + 8))


@dataclass(frozen=True)
class Format:
    """The bits, group size and dtypes of a record."""

    bits: int
    group_size: int  # 32, 64 or 128: a longer group is repeated in every unit
    asymmetric: bool
    scale_dtype: torch.dtype

    @property
    def groups(self) -> int:
        return UNIT_CHANNELS // self.group_size

    @property
    def weight_bytes(self) -> int:
        return TILE_ROWS * UNIT_CHANNELS * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        return self.groups * TILE_ROWS * self.scale_dtype.itemsize

    @property
    def record_bytes(self) -> int:
        return self.weight_bytes + self.scale_bytes + (self.groups * TILE_ROWS if self.asymmetric else 0)


def format_of(weight: PackedWeight) -> Format:
    group_size = UNIT_CHANNELS if weight.group_size == -1 else weight.group_size
    return Format(weight.bits, group_size, weight.zero is not None, weight.scale.dtype)


@dataclass(frozen=True)
class FragmentPlace:
    """Where bits of one weight lie in a record."""

    word: int
    shift: int
    low: int  # the first of the weight's bits that lie here
    width: int


def places(bits: int, row: int, channel: int) -> list[FragmentPlace]:
    """Where the bits of weight (row, channel) of a record lie."""
    half, in_half = divmod(channel, HALF_CHANNELS)
    step, in_step = divmod(in_half, STEP_CHANNELS)
    pair = 2 * (in_step // 8) + row // 8
    lane = row % 8 * 4 + in_step % 8 // 2
    odd = channel % 2
    block = half * LANES + lane
    if bits == 4:
        return [FragmentPlace(block * 4 + step, 4 * pair + 16 * odd, 0, 4)]
    if bits == 8:
        word = 2 * step + pair // 2  # of the lane's eight, which two loads bring four at a time
        return [
            FragmentPlace(half * 256 + word // 4 * 128 + lane * 4 + word % 4, 16 * (pair % 2) + 8 * odd, 0, 8)
        ]
    low = FragmentPlace(block * 2 + step // 2, 8 * (step % 2) + 2 * pair + 16 * odd, 0, 2)
    if bits == 2:
        return [low]
    return [low, FragmentPlace(2 * LANES * 2 + block, THIRD_BIT[step][pair] + 16 * odd, 2, 1)]


@functools.cache
def scatter_table(bits: int) -> Tensor:
    """int64 (4, n): flat index, first bit, width and place (word * 32 + shift) of each part of a weight."""
    rows = [
        (row * UNIT_CHANNELS + channel, field.low, field.width, field.word * 32 + field.shift)
        for row in range(TILE_ROWS)
        for channel in range(UNIT_CHANNELS)
        for field in places(bits, row, channel)
    ]
    return torch.tensor(rows, dtype=torch.int64).T.contiguous()


def pack_weights(q: Tensor, bits: int) -> Tensor:
    """uint8 (records, TILE_ROWS * UNIT_CHANNELS) to the records' words, int32 (records, 64 * bits)."""
    index, low, width, position = scatter_table(bits).to(q.device)
    parts = (q[:, index].to(torch.int64) >> low) & ((1 << width) - 1)
    words = torch.zeros(q.shape[0], 64 * bits, dtype=torch.int64, device=q.device)
    words.index_add_(1, position // 32, parts << (position % 32))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def in_tiles(values: Tensor) -> Tensor:
    """(rows, columns), padded with zeros to whole tiles of rows: (tiles, TILE_ROWS, columns)."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % TILE_ROWS))
    return padded.view(-1, TILE_ROWS, values.shape[1])


def by_group(values: Tensor, form: Format, units: int) -> Tensor:
    """Scales or zero points (rows, groups) to (units, tiles, groups of a unit, TILE_ROWS in ROW_ORDER)."""
    tiled = in_tiles(values)[:, list(ROW_ORDER)]
    if values.shape[1] == 1:
        tiled = tiled.expand(-1, -1, units * form.groups)
    padded = torch.nn.functional.pad(tiled, (0, units * form.groups - tiled.shape[2]))
    return padded.view(-1, TILE_ROWS, units, form.groups).permute(2, 0, 3, 1).contiguous()


def make_records(weight: PackedWeight) -> Tensor:
    """uint8 (units, tiles, record bytes), on the weight's device: the plain description of `repack.cu`.

    What pads a row or a channel has scale 0.
    """
    form = format_of(weight)
    units = -(-weight.in_features // UNIT_CHANNELS)
    q = unpack_rows(weight.qweight, weight.bits, weight.in_features)
    q = in_tiles(torch.nn.functional.pad(q, (0, units * UNIT_CHANNELS - weight.in_features)))
    tiles = q.shape[0]
    q = q.view(tiles, TILE_ROWS, units, UNIT_CHANNELS).permute(2, 0, 1, 3).reshape(units * tiles, -1)
    parts = [pack_weights(q, weight.bits).view(torch.uint8).view(units, tiles, form.weight_bytes)]
    scale = by_group(weight.scale, form, units)
    parts.append(scale.view(torch.uint8).view(units, tiles, form.scale_bytes))
    if weight.zero is not None:
        parts.append(by_group(weight.zero, form, units).view(units, tiles, -1))
    return torch.cat(parts, dim=2)
