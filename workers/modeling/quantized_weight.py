"""A quantized linear with its integers unpacked, as the search makes it and formats pack it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from kernels.operators import pack
from kernels.weight import PackedWeight


@dataclass(frozen=True)
class QuantizedWeight:
    """w = (q - zero) * scale per group of consecutive input channels.

    `scale` holds values that are exact in the dtype of every format that stores them. A symmetric grid
    has the constant zero point 2^(bits-1).
    """

    q: Tensor  # uint8 (out_features, in_features), 0..2^bits-1
    scale: Tensor  # float32 (out_features, groups)
    zero: Tensor  # uint8 (out_features, groups)
    scheme: Scheme

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.q.shape[1]

    def packed(self) -> PackedWeight:
        """The canonical weight. Raises ValueError for a symmetric grid with other zero points."""
        bits, zero = self.scheme.bits, self.zero.contiguous()
        if self.scheme.symmetric and not bool((zero == 2 ** (bits - 1)).all()):
            raise ValueError(f"a symmetric grid of {bits} bits has zero points other than {2 ** (bits - 1)}")
        return PackedWeight(
            pack(self.q.contiguous(), bits), self.scale.contiguous(), None if self.scheme.symmetric else zero,
            bits, self.scheme.group_size, self.shape[1],
        )  # fmt: skip

    def to(self, device: torch.device) -> QuantizedWeight:
        q, scale, zero = (tensor.to(device) for tensor in (self.q, self.scale, self.zero))
        return QuantizedWeight(q, scale, zero, self.scheme)

    def dequantize(self) -> Tensor:
        """float32 (out_features, in_features)."""
        out_features, in_features = self.shape
        grouped = self.q.view(out_features, self.scale.shape[1], -1).to(torch.float32)
        return ((grouped - self.zero[..., None]) * self.scale[..., None]).view(out_features, in_features)

    def where(self, rows: Tensor, other: QuantizedWeight) -> QuantizedWeight:
        """These rows (a mask) of this weight, the rest of `other`."""
        pairs = ((self.q, other.q), (self.scale, other.scale), (self.zero, other.zero))
        q, scale, zero = (torch.where(rows[:, None], own, theirs) for own, theirs in pairs)
        return QuantizedWeight(q, scale, zero, self.scheme)
