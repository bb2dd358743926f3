"""How large the keys and values of a layer become that enter a cache, from the calibration pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from app.core.errors import ModelRefused
from workers.modeling.cache_rounding import unclear
from workers.quantization.reduction import Ranks

AXES = 4  # of keys: batch, heads, tokens, head size


@dataclass(frozen=True)
class CacheRange:
    """The largest |x| of each channel of one layer's keys and values: (heads x head size,) float32."""

    key: Tensor
    value: Tensor

    def to(self, device: torch.device) -> CacheRange:
        return CacheRange(self.key.to(device), self.value.to(device))


class RangeCollector:
    """The largest sizes over the batches so far of what `attention` hands to its cache."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention
        self.largest: tuple[Tensor, Tensor] | None = None

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Note them, and leave them as they are."""
        if keys.dim() != AXES or values.dim() != AXES:
            raise unclear(self.attention, f"hands over keys of shape {tuple(keys.shape)}")
        key, value = (each.abs().amax(dim=(0, 2)).flatten().to(torch.float32) for each in (keys, values))
        if self.largest is not None:
            key, value = (torch.maximum(a, b) for a, b in zip(self.largest, (key, value), strict=True))
        self.largest = key, value
        return keys, values

    def result(self, name: str, ranks: Ranks) -> CacheRange:
        """Of all ranks, for the first of them; `name` is the layer's.

        Raises ModelRefused for an attention that handed nothing over, or numbers that are not finite.
        """
        if self.largest is None:
            raise unclear(self.attention, "hands no keys and values to its cache")
        for each in self.largest:
            ranks.take_largest(each)
        if not all(bool(torch.isfinite(each).all()) for each in self.largest):
            raise ModelRefused(
                f"keys or values of {name} are not finite on the calibration text",
                code="activations_not_finite",
                remedy="check that the model gives finite outputs in its own dtype",
            )
        return CacheRange(*self.largest)
