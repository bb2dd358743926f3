"""Schemes by name: the numbers that weights are stored as, and those that a linear's input is rounded to.

Beside them the numbers that a cache of keys and values holds.

Sources: compressed-tensors 0.20 (`quantization/quant_scheme.py`), whose files vLLM and SGLang read; OCP
Microscaling Formats 1.0 for mxfp4; DeepSeek-V3's blocks of 128 x 128 for fp8-block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SchemeName = Literal[
    "wna16", "w4a8", "w8a8", "w8a8-static", "fp8", "fp8-block", "fp8-static", "nvfp4", "nvfp4a16", "mxfp4",
    "mxfp4a16",
]  # fmt: skip
CacheName = Literal["fp8"]
Numbers = Literal["int", "float"]
# plain: floats of the model's dtype; e4m3: FP8 under one float32 for the whole matrix; e8m0: powers of two
Scales = Literal["plain", "e4m3", "e8m0"]


@dataclass(frozen=True)
class InputRounding:
    """What the input of a linear is rounded to, with a scale each for a tensor, a token or a group of it."""

    bits: int
    numbers: Numbers
    scope: Literal["tensor", "token", "group"]
    group_size: int | None = None
    scales: Scales = "plain"

    @property
    def needs_range(self) -> bool:
        """Whether the files hold a range that calibration has seen."""
        return self.scope == "tensor" or self.scales == "e4m3"


@dataclass(frozen=True)
class SchemeKind:
    """What a scheme's name says; None where the recipe decides."""

    bits: int | None
    group_size: int | None  # -1: one scale for a row
    symmetric: bool | None
    numbers: Numbers = "int"
    block_rows: int = 1  # that share a scale
    scales: Scales = "plain"
    inputs: InputRounding | None = None  # None: not rounded


FP8_TOKEN = InputRounding(8, "float", "token")
SCHEMES: Mapping[SchemeName, SchemeKind] = {
    "wna16": SchemeKind(None, None, None),
    "w4a8": SchemeKind(4, 128, symmetric=True, inputs=FP8_TOKEN),
    "w8a8": SchemeKind(8, -1, symmetric=True, inputs=InputRounding(8, "int", "token")),
    "w8a8-static": SchemeKind(8, -1, symmetric=True, inputs=InputRounding(8, "int", "tensor")),
    "fp8": SchemeKind(8, -1, symmetric=True, numbers="float", inputs=FP8_TOKEN),
    "fp8-block": SchemeKind(
        8, 128, symmetric=True, numbers="float", block_rows=128,
        inputs=InputRounding(8, "float", "group", 128),
    ),
    "fp8-static": SchemeKind(
        8, -1, symmetric=True, numbers="float", inputs=InputRounding(8, "float", "tensor")
    ),
    "nvfp4": SchemeKind(
        4, 16, symmetric=True, numbers="float", scales="e4m3",
        inputs=InputRounding(4, "float", "group", 16, "e4m3"),
    ),
    "nvfp4a16": SchemeKind(4, 16, symmetric=True, numbers="float", scales="e4m3"),
    "mxfp4": SchemeKind(
        4, 32, symmetric=True, numbers="float", scales="e8m0",
        inputs=InputRounding(4, "float", "group", 32, "e8m0"),
    ),
    "mxfp4a16": SchemeKind(4, 32, symmetric=True, numbers="float", scales="e8m0"),
}  # fmt: skip

# One scale for the keys of a layer and one for its values.
CACHES: Mapping[CacheName, InputRounding] = {"fp8": InputRounding(8, "float", "tensor")}
