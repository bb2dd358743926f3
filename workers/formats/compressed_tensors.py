"""The `pack-quantized` layout of compressed-tensors.

A linear gives weight_packed int32 (out, ceil(in * bits / 32)), weight_scale in the model's dtype
(out, groups), weight_shape int64 (2), and for asymmetric grids weight_zero_point int32
(ceil(out * bits / 32), groups), packed along the output channels. Source: compressed-tensors
`compressors/pack_quantized`, where integers are signed and stored with 2^(bits-1) added.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from app.core.planning.format_limits import Scheme
from app.core.planning.plan import CandidatePlan
from kernels.layouts import packed_words
from kernels.operators import pack, unpack
from workers.formats.targets import compact_patterns, expert_names, fused_names
from workers.modeling.quantized_weight import QuantizedWeight

CONFIG_FILE = None  # nothing beside config.json
FORMAT = "pack-quantized"
# Whose packing is followed: up to 0.17 the library left two bits of each word unused at 3 bits.
VERSION = "0.20.0"
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def tensors(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one linear."""
    bits = weight.scheme.bits
    stored = {
        "weight_packed": pack(weight.q, bits),
        "weight_scale": weight.scale.to(dtype),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if not weight.scheme.symmetric:
        stored["weight_zero_point"] = pack(weight.zero, bits, down=True)
    return stored


def weight(stored: dict[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `tensors`."""
    out_features, in_features = (int(size) for size in stored["weight_shape"])
    scale = stored["weight_scale"].to(torch.float32)
    if scheme.symmetric:
        zero = torch.full_like(scale, 2 ** (scheme.bits - 1)).to(torch.uint8)
    else:
        zero = unpack(stored["weight_zero_point"], scheme.bits, out_features, down=True)
    q = unpack(stored["weight_packed"], scheme.bits, in_features)
    return QuantizedWeight(q, scale, zero, scheme)


def shapes(
    out_features: int, in_features: int, scheme: Scheme, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a linear."""
    groups = scheme.groups(in_features)
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight_packed": ((out_features, packed_words(in_features, scheme.bits)), torch.int32),
        "weight_scale": ((out_features, groups), dtype),
        "weight_shape": ((2,), torch.int64),
    }
    if not scheme.symmetric:
        found["weight_zero_point"] = ((packed_words(out_features, scheme.bits), groups), torch.int32)
    return found


def quantization_config(candidate: CandidatePlan) -> dict[str, Any]:
    """The entry of config.json: one config group per scheme."""
    found = dict.fromkeys(linear.scheme for linear in candidate.linears if linear.scheme)
    # transformers reads all experts by the first group that names any. With the widest first, narrower ones
    # have too few words for it and loading fails, where it would else give other weights without a word.
    schemes = sorted(found, key=lambda scheme: -scheme.bits)
    groups = {
        f"group_{index}": config_group(candidate, scheme, only=len(schemes) == 1)
        for index, scheme in enumerate(schemes)
    }
    # transformers builds the compressed modules without weights, and compressed-tensors 0.20 leaves their
    # zero points unpacked there, so asymmetric files don't fit. Dequantizing while loading is the route that
    # works; other loaders don't read this key. With several schemes that route takes the first for all
    # linears and may give wrong weights without a word: then the loader shall refuse the files.
    dequantize = len(schemes) == 1 and not schemes[0].symmetric
    return {
        **({"dequantize": True} if dequantize else {}),
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": asked_names(candidate.kept),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": VERSION,
    }


def asked_names(names: Iterable[str]) -> list[str]:
    """The names with those that servers ask by in their place: of fused matrices, and of experts' linears.

    Not patterns in `ignore`: vLLM and SGLang rename modules there where their classes have other names.
    """
    return list(
        dict.fromkeys(other for name in names for other in (name, *fused_names(name), *expert_names(name)))
    )


def config_group(candidate: CandidatePlan, scheme: Scheme, *, only: bool) -> dict[str, Any]:
    names = asked_names(linear.name for linear in candidate.linears if linear.scheme == scheme)
    patterns = compact_patterns(names, asked_names(linear.name for linear in candidate.linears))
    return {
        "targets": ["Linear"] if only else ["re:" + pattern for pattern in patterns],
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if scheme.group_size == -1 else "group",
            "group_size": None if scheme.group_size == -1 else scheme.group_size,
            "actorder": None,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }
