"""A linear's tensors in any of the file formats: from the search's result to the kernels' packed weight.

One reader for what was just written and is verified, and for what is served, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from app.core.formats.registry import FormatName
from kernels.weight import PackedWeight
from workers.modeling.quantized_weight import QuantizedWeight

Stored = Mapping[str, Tensor]  # a linear's tensors by suffix
Entry = Mapping[str, Any]  # `quantization_config` of config.json


class ReadWeight(Protocol):
    """A weight as files hold it, where kernels don't compute from it."""

    def dequantize(self) -> Tensor:
        """float32 (out_features, in_features)."""

    def equals(self, other: QuantizedWeight) -> bool:
        """Whether this is what files hold of `other`."""


class Packing(Protocol):
    """The interface of a format's module."""

    def pack_linear(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a linear, by suffix; `dtype` is the model's."""

    def unpack_linear(
        self, stored: Stored, entry: Entry, scheme: Scheme | None = None
    ) -> PackedWeight | ReadWeight:
        """The weight of a linear's tensors, packed where kernels compute from it.

        Without `scheme`, shapes and `entry` say what it is.

        Raises ValueError for tensors that don't belong together or that kernels can't compute from.
        """


def packing_of(name: FormatName) -> Packing:
    """The module that packs the format; it is found by the format's name."""
    return cast("Packing", import_module(f"workers.formats.{name.replace('-', '_')}_packing"))


def group_size_of(in_features: int, groups: int) -> int:
    """-1 for one group in a row. Raises ValueError if the groups are not whole."""
    if groups == 1:
        return -1
    if groups < 1 or in_features % groups:
        raise ValueError(f"{groups} groups don't divide in_features={in_features}")
    return in_features // groups
