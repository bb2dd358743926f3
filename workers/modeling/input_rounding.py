"""Inputs of linears rounded as a scheme says, in the inputs' own dtype: what a server's kernel multiplies by.

The rules are those of compressed-tensors (`quantization/utils/helpers.py`): a scale is the largest size over
the largest number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from app.core.formats.schemes import InputRounding
from workers.modeling.float_numbers import (
    FP4_LARGEST,
    FP8_LARGEST,
    float_codes,
    float_values,
    fp8_scales,
    largest_float,
    microscale,
)

SMALLEST = 1e-10  # in place of the scale of zeros


@dataclass(frozen=True)
class InputRounder:
    """The rounding of one linear's input."""

    rounding: InputRounding
    scale: Tensor | None = None  # (1,) float32, as files hold it, where the rounding needs a range

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., C), each value moved to the nearest that its scale gives it."""
        values = x.to(torch.float32)
        size = self.rounding.group_size
        if self.rounding.scope == "group":
            assert size is not None
            values = values.reshape(*values.shape[:-1], -1, size)
        scale = self.scales(values)
        return (nearest(values / scale, self.rounding) * scale).view(x.shape).to(x.dtype)

    def scales(self, values: Tensor) -> Tensor:
        """What the values are divided by, one for each of their last axis or one for all."""
        largest = largest_number(self.rounding)
        if self.rounding.scope == "tensor":
            assert self.scale is not None
            return self.scale
        sizes = values.abs().amax(dim=-1, keepdim=True)
        match self.rounding.scales:
            case "e8m0":
                return microscale(sizes.clamp(min=SMALLEST))
            case "e4m3":
                assert self.scale is not None
                return fp8_scales(sizes / largest, self.scale)
            case _:
                return (sizes / largest).clamp(min=SMALLEST)


def largest_number(rounding: InputRounding) -> float:
    """The number that the largest size becomes."""
    if rounding.numbers == "float":
        return largest_float(rounding.bits)
    return float((2**rounding.bits - 1) / 2)


def nearest(values: Tensor, rounding: InputRounding) -> Tensor:
    """float32 values as the nearest of the rounding's numbers."""
    if rounding.numbers == "int":
        half = 2 ** (rounding.bits - 1)
        return values.round().clamp(-half, half - 1)
    return float_values(float_codes(values, rounding.bits), rounding.bits)


def static_scale(rounding: InputRounding, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """(1,): of inputs up to the size `largest`, as files of a model of `dtype` hold it."""
    largest = largest.to(torch.float32).clamp(min=SMALLEST).reshape(1)
    if rounding.scales == "e4m3":
        return FP8_LARGEST * FP4_LARGEST / largest
    return (largest / largest_number(rounding)).to(dtype).to(torch.float32)


@contextmanager
def rounding_inputs(layer: nn.Module, rounders: Mapping[str, InputRounder]) -> Iterator[None]:
    """Round the inputs of these modules of `layer` while it runs."""

    def hook(rounder: InputRounder) -> Any:
        return lambda _module, inputs: (rounder(inputs[0]), *inputs[1:])

    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(hook(rounder))
        for name, rounder in rounders.items()
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
