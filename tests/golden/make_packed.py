"""Makes `packed.json`: the bytes of small quantized weights in each format.

    python -m tests.golden.make_packed

The file is frozen: artifacts that were published must stay readable. Run this again only for a further case,
or when a format itself changes, and say so in the change log.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from app.core.formats.schemes import SCHEMES
from app.core.planning.cached_attention import CACHE_SCALES
from app.core.records.specs import Recipe
from workers.formats import awq_packing, compressed_tensors_packing, gptq_packing
from workers.modeling.cache_rounding import cache_scale
from workers.modeling.quantized_weight import QuantizedWeight, zero_point

FROZEN = Path(__file__).with_name("packed.json")
IN_FEATURES = 64


def golden_weight(scheme: Scheme, out_features: int = 8) -> QuantizedWeight:
    """Integers and scales from plain arithmetic: no generator whose stream may change."""
    groups = scheme.groups(IN_FEATURES)
    cells = torch.arange(out_features * IN_FEATURES)
    blocks = torch.arange(out_features * groups)
    zero = torch.full_like(blocks, 2 ** (scheme.bits - 1)) if scheme.symmetric else blocks * 5 + 3
    return QuantizedWeight(
        (cells * 7 % 61 % 2**scheme.bits).to(torch.uint8).view(out_features, IN_FEATURES),
        ((blocks + 1) * 2.0**-9).view(out_features, groups),
        (zero % 2**scheme.bits).to(torch.uint8).view(out_features, groups),
        scheme,
    )


def golden_scheme_weight(recipe: Recipe, out_features: int = 128) -> QuantizedWeight:
    """Codes and scales of a scheme by name, from plain arithmetic; 128 columns, one block of FP8."""
    scheme, columns = recipe.scheme_of("linear"), 128
    groups, kind = scheme.groups(columns), scheme.kind
    cells = torch.arange(out_features * columns)
    codes = cells * 7 % 61 if scheme.bits > 4 else cells * 7 % 16
    rows = torch.arange(out_features) // kind.block_rows
    scale = 2.0 ** -(1 + (rows[:, None] + torch.arange(groups)) % 7).float()
    needs_range = kind.inputs is not None and kind.inputs.needs_range
    return QuantizedWeight(
        codes.to(torch.uint8).view(out_features, columns),
        scale,
        torch.full_like(scale, zero_point(scheme), dtype=torch.uint8),
        scheme,
        divisor=torch.tensor([4.0]) if kind.scales == "e4m3" else None,
        input_scale=torch.tensor([0.5]) if needs_range else None,
    )


def entry(value: Tensor) -> dict[str, object]:
    return {
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        "hex": value.contiguous().view(-1).view(torch.uint8).numpy().tobytes().hex(),
    }


def packed() -> dict[str, dict[str, dict[str, object]]]:
    """Format and scheme to tensor to content."""
    four = golden_weight(Scheme(bits=4, group_size=32, symmetric=False))
    three = golden_weight(Scheme(bits=3, group_size=32, symmetric=True))
    two = golden_weight(Scheme(bits=2, group_size=32, symmetric=False))
    eight = golden_weight(Scheme(bits=8, group_size=-1, symmetric=False))
    cases = {
        "awq w4 g32": awq_packing.pack_linear(four, torch.bfloat16),
        "compressed-tensors w4 g32": compressed_tensors_packing.pack_linear(four, torch.bfloat16),
        "compressed-tensors w3 g32 sym": compressed_tensors_packing.pack_linear(three, torch.bfloat16),
        "compressed-tensors w2 g32": compressed_tensors_packing.pack_linear(two, torch.bfloat16),
        "compressed-tensors w8 channel": compressed_tensors_packing.pack_linear(eight, torch.bfloat16),
    }
    for bits in (2, 3, 4, 8):
        weight = golden_weight(Scheme(bits=bits, group_size=32, symmetric=True), 32)
        cases[f"gptq w{bits} g32 sym"] = gptq_packing.pack_linear(weight, torch.bfloat16)
    for name in SCHEMES:
        if name != "wna16":
            rows = 128 if name == "fp8-block" else 2
            weight = golden_scheme_weight(Recipe(scheme=name), rows)
            cases[f"compressed-tensors {name}"] = compressed_tensors_packing.pack_linear(
                weight, torch.bfloat16
            )
    cases["compressed-tensors kv fp8"] = {
        name: cache_scale("fp8", torch.tensor(largest), torch.bfloat16).to(torch.bfloat16)
        for name, largest in zip(CACHE_SCALES, (7.75, 0.0), strict=True)
    }
    return {case: {name: entry(value) for name, value in tensors.items()} for case, tensors in cases.items()}


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(packed(), indent=1) + "\n", "utf-8")
