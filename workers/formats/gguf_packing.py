"""Blocks of 32 weights as llama.cpp reads them (app/core/formats/gguf.py); numbers are little-endian.

Q4_0 w = (q - 8) d, Q4_1 w = q d + m: the first 16 integers in the low halves of 16 bytes, the others in the
high halves. Q8_0 w = q d with signed bytes. d and m are float16: m = -zero x scale is rounded to it, and what
is read back is what llama.cpp computes from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from app.core.formats.gguf import BLOCK, block_of
from workers.formats.packings import Entry, Stored
from workers.modeling.quantized_weight import QuantizedWeight, zero_point

HALF = BLOCK // 2


@dataclass(frozen=True)
class BlockWeight:
    """w = q * scale + minimum per block."""

    q: Tensor  # uint8 (out_features, blocks, 32), 0..2^bits-1
    scale: Tensor  # float16 (out_features, blocks)
    minimum: Tensor  # float32 (out_features, blocks)

    def dequantize(self) -> Tensor:
        """float32 (out_features, in_features)."""
        scaled = self.q.to(torch.float32) * self.scale.to(torch.float32)[..., None]
        return scaled.add_(self.minimum[..., None]).flatten(1)

    def equals(self, other: QuantizedWeight) -> bool:
        """Whether this is the weight `other` as blocks hold it."""
        scale, minimum = scale_of(other), minimum_of(other)
        return (
            torch.equal(self.q.flatten(1), other.q)
            and torch.equal(self.scale, scale)
            and torch.equal(self.minimum, minimum)
        )


def scale_of(weight: QuantizedWeight) -> Tensor:
    return weight.scale.to(torch.float16)


def minimum_of(weight: QuantizedWeight) -> Tensor:
    """float32, as the file says it: of symmetric grids the scale itself, else rounded to float16."""
    if weight.scheme.symmetric:
        return weight.scale * -float(zero_point(weight.scheme))
    return (weight.scale * -weight.zero.to(torch.float32)).to(torch.float16).to(torch.float32)


def pack_linear(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Raises ValueError for a minimum beyond float16."""
    scale, minimum = scale_of(weight), minimum_of(weight)
    if not bool(minimum.isfinite().all()):
        raise ValueError("the smallest weight of a group is beyond float16, which GGUF stores it in")
    q = weight.q.view(*scale.shape, BLOCK)
    numbers = [scale] if weight.scheme.symmetric else [scale, minimum.to(torch.float16)]
    halves = [number.contiguous().view(torch.uint8).view(*scale.shape, 2) for number in numbers]
    # Of 8 bits 0..255 about 128 to signed bytes.
    integers = q ^ 0x80 if weight.scheme.bits == 8 else q[..., :HALF] | q[..., HALF:] << 4
    return {"blocks": torch.cat([*halves, integers], dim=-1).flatten(1)}


def unpack_linear(stored: Stored, entry: Entry, scheme: Scheme | None = None) -> BlockWeight:
    if scheme is None:
        raise ValueError("the scheme of a linear is not in its blocks")
    blocks = stored["blocks"]
    blocks = blocks.view(blocks.shape[0], -1, block_of(scheme).size)
    scale, rest = float16(blocks[..., :2]), blocks[..., 2:]
    if scheme.symmetric:
        minimum = scale.to(torch.float32) * -float(zero_point(scheme))
    else:
        minimum, rest = float16(rest[..., :2]).to(torch.float32), rest[..., 2:]
    q = rest ^ 0x80 if scheme.bits == 8 else torch.cat([rest & 0xF, rest >> 4], dim=-1)
    return BlockWeight(q, scale, minimum)


def float16(halves: Tensor) -> Tensor:
    return halves.contiguous().view(torch.float16).squeeze(-1)
