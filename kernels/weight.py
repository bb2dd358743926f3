"""The canonical weight of a quantized linear: files and backends hold it in layouts of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.checks import check_packed


@dataclass(frozen=True)
class PackedWeight:
    """w = (q - zero) * scale per group of consecutive input channels.

    Raises TypeError or ValueError for tensors that don't belong together.
    """

    qweight: Tensor  # int32 (out_features, ceil(in_features * bits / 32)), rows of layouts.pack_rows
    scale: Tensor  # float16, bfloat16 or float32 (out_features, groups)
    zero: Tensor | None  # uint8 (out_features, groups); None: 2^(bits-1) everywhere
    bits: int
    group_size: int  # 32, 64, 128, or -1: the whole row
    in_features: int

    def __post_init__(self) -> None:
        check_packed(self.qweight, self.scale, self.zero, self.bits, self.group_size, self.in_features)

    @property
    def out_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    @property
    def channels_per_group(self) -> int:
        return self.in_features // self.groups

    @property
    def packed_bytes(self) -> int:
        tensors = [self.qweight, self.scale, *([] if self.zero is None else [self.zero])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def equals(self, other: PackedWeight) -> bool:
        """Whether both hold the same numbers, whatever the dtype of their scales."""
        if self.zero is None or other.zero is None:
            same_zeros = self.zero is other.zero
        else:
            same_zeros = torch.equal(self.zero, other.zero)
        return (
            same_zeros
            and (self.bits, self.in_features) == (other.bits, other.in_features)
            and torch.equal(self.qweight, other.qweight)
            and torch.equal(self.scale.float(), other.scale.float())
        )

    def to(self, device: torch.device) -> PackedWeight:
        zero = None if self.zero is None else self.zero.to(device)
        return replace(self, qweight=self.qweight.to(device), scale=self.scale.to(device), zero=zero)
