"""The `pack-quantized` layout of compressed-tensors: rows packed densely, zero points down the columns.

Source: compressed-tensors `compressors/pack_quantized`, where integers are signed and stored with 2^(bits-1)
added. Only asymmetric grids have zero points in the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from app.core.formats.file_format import FileFormat, ModuleSchemes, Scheme, StoredTensor, words
from app.core.formats.targets import compact_patterns, expert_names, fused_names

LAYOUT = "pack-quantized"
# Whose packing is followed: up to 0.17 the library left two bits of each word unused at 3 bits.
VERSION = "0.20.0"
# Of the table of families: types whose files transformers opens with other weights.
MISREAD = Path(__file__).parent / "transformers_misreads.json"
UNOPENED = "transformers cannot open compressed-tensors files"


class CompressedTensorsFormat(FileFormat):
    """All schemes, and several in one model."""

    # g_idx is written by others alone: channels out of order, which the reader refuses.
    suffixes = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    transformers_needs = ("compressed-tensors>=0.15.0",)

    def tensors(
        self, out_features: int, in_features: int, scheme: Scheme, dtype: str
    ) -> dict[str, StoredTensor]:
        groups = scheme.groups(in_features)
        table = {
            "weight_packed": StoredTensor((out_features, words(in_features, scheme.bits)), "I32"),
            "weight_scale": StoredTensor((out_features, groups), dtype),
            "weight_shape": StoredTensor((2,), "I64"),
        }
        if not scheme.symmetric:
            table["weight_zero_point"] = StoredTensor((words(out_features, scheme.bits), groups), "I32")
        return table

    def entry(self, modules: ModuleSchemes) -> dict[str, Any]:
        """One config group per scheme."""
        # transformers reads all experts by the first group that names any. With the widest first, narrower
        # ones have too few words for it and loading fails, where it would else give other weights silently.
        schemes = sorted(modules.distinct, key=lambda scheme: -scheme.bits)
        only = len(schemes) == 1
        groups = {
            f"group_{index}": config_group(modules, scheme, only=only) for index, scheme in enumerate(schemes)
        }
        # transformers builds the compressed modules without weights, and compressed-tensors 0.20 leaves their
        # zero points unpacked there, so asymmetric files don't fit. Dequantizing while loading is the route
        # that works; other loaders don't read this key. With several schemes that route takes the first for
        # all linears and may silently give wrong weights, so then the loader must refuse the files.
        dequantize = only and not schemes[0].symmetric
        return {
            **({"dequantize": True} if dequantize else {}),
            "quant_method": "compressed-tensors",
            "format": LAYOUT,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [
                *asked_names(modules.unquantized),
                *(f"re:{tower}" for tower in modules.tower_patterns),
            ],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "version": VERSION,
        }

    def loader_notes(self, modules: ModuleSchemes, model_type: str) -> Iterator[str]:
        schemes, experts = modules.distinct, modules.of_experts
        if model_type in misread_types():
            yield (
                f"transformers 5.24 opens compressed-tensors files of {model_type} with other weights than "
                "they hold, without an error; use another loader"
            )
        if modules.narrow:
            yield (
                f"vLLM 0.33 runs compressed-tensors files of {modules.narrow} bits on NVIDIA GPUs alone; "
                "SGLang 0.5.23 takes 4 and 8 bits alone"
            )
        if any(scheme.bits == 3 for scheme in schemes):
            yield "transformers opens 3 bits with compressed-tensors 0.18 or later; vLLM 0.33 installs 0.17"
        asymmetric = not all(scheme.symmetric for scheme in schemes)
        if asymmetric and experts - {None}:
            yield f"{UNOPENED} of asymmetric experts; set symmetric to true if it has to"
        elif len(experts) > 1 or None in experts:
            yield (
                f"{UNOPENED} whose experts have several schemes or keep their precision; let `overrides` and "
                "`ignore` match no experts if it has to"
            )
        if asymmetric and len(schemes) > 1:
            yield (
                f"{UNOPENED} of several asymmetric schemes; leave out the overrides or set symmetric to true "
                "if it has to"
            )

    def unreadable(self, entry: Mapping[str, Any]) -> str | None:
        if entry.get("format") != LAYOUT:
            return f"the compressed-tensors format {entry.get('format')!r} is not {LAYOUT}"
        if any(group.get("input_activations") for group in (entry.get("config_groups") or {}).values()):
            return "quantized activations are not computed here, only weights"
        return None


@cache
def misread_types() -> frozenset[str]:
    return frozenset(json.loads(MISREAD.read_text("utf-8")))


def asked_names(names: Iterable[str]) -> list[str]:
    """The names, replaced by those that servers ask for: of fused matrices, and of experts' linears.

    Not patterns alone in `ignore`: vLLM and SGLang rename modules there where their classes have other names.
    """
    return list(
        dict.fromkeys(other for name in names for other in (name, *fused_names(name), *expert_names(name)))
    )


def config_group(modules: ModuleSchemes, scheme: Scheme, *, only: bool) -> dict[str, Any]:
    names = asked_names(name for name, other in modules.linears.items() if other == scheme)
    patterns = compact_patterns(names, asked_names(modules.linears))
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
        "format": LAYOUT,
    }
