"""A quantized linear with its codes unpacked, as the search makes it and formats pack it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from kernels.operators import pack
from kernels.weight import PackedWeight
from workers.modeling.float_numbers import float_values


def zero_point(scheme: Scheme) -> int:
    """The code of zero in a symmetric scheme."""
    return 0 if scheme.kind.numbers == "float" else int(2 ** (scheme.bits - 1))


TENSORS = ("q", "scale", "zero", "divisor", "input_scale")


@dataclass(frozen=True)
class QuantizedWeight:
    """w = (q - zero) * scale per group of consecutive input channels; of float schemes value(q) * scale.

    `scale` holds values that are exact in the dtype of every format that stores them. A symmetric grid
    has the constant zero point 2^(bits-1), numbers with an exponent have 0.
    """

    q: Tensor  # uint8 (out_features, in_features), 0..2^bits-1, or bit patterns
    scale: Tensor  # float32 (out_features, groups)
    zero: Tensor  # uint8 (out_features, groups)
    scheme: Scheme
    divisor: Tensor | None = None  # float32 (1,): stored scales are FP8, divided by this
    input_scale: Tensor | None = None  # float32 (1,): of the input's range in calibration, as files hold it

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.q.shape[1]

    def packed(self) -> PackedWeight:
        """The canonical weight. Raises ValueError for a symmetric grid with other zero points."""
        bits, zero = self.scheme.bits, self.zero.contiguous()
        if self.scheme.symmetric and not bool((zero == zero_point(self.scheme)).all()):
            raise ValueError(f"a symmetric grid of {bits} bits has zero points other than {2 ** (bits - 1)}")
        return PackedWeight(
            pack(self.q.contiguous(), bits), self.scale.contiguous(), None if self.scheme.symmetric else zero,
            bits, self.scheme.group_size, self.shape[1],
        )  # fmt: skip

    def to(self, device: torch.device) -> QuantizedWeight:
        """The weight on `device`."""
        return self.changed(lambda tensor: tensor.to(device))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field."""
        every = {field: getattr(self, field) for field in TENSORS}
        return {field: tensor for field, tensor in every.items() if tensor is not None}

    def changed(self, change: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        """The weight with every tensor changed."""
        changes: dict[str, Any] = {field: change(tensor) for field, tensor in self.tensors.items()}
        return replace(self, **changes)

    def equals(self, other: QuantizedWeight) -> bool:
        """Whether both hold the same numbers."""
        own, theirs = self.tensors, other.tensors
        return own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)

    def dequantize(self) -> Tensor:
        """float32 (out_features, in_features)."""
        out_features, in_features = self.shape
        if self.scheme.kind.numbers == "float":
            values = float_values(self.q, self.scheme.bits).view(out_features, self.scale.shape[1], -1)
            return (values * self.scale[..., None]).view(out_features, in_features)
        grouped = self.q.view(out_features, self.scale.shape[1], -1).to(torch.float32)
        return ((grouped - self.zero[..., None]) * self.scale[..., None]).view(out_features, in_features)

    def where(self, rows: Tensor, other: QuantizedWeight) -> QuantizedWeight:
        """These rows (a mask) of this weight, the rest of `other`."""
        pairs = ((self.q, other.q), (self.scale, other.scale), (self.zero, other.zero))
        q, scale, zero = (torch.where(rows[:, None], own, theirs) for own, theirs in pairs)
        return replace(self, q=q, scale=scale, zero=zero)
