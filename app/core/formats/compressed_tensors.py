"""The layouts of compressed-tensors, one for each kind of numbers.

- `pack-quantized`: integers, rows packed densely, zero points down the columns. Source: its
  `compressors/pack_quantized`, where integers are signed and stored with 2^(bits-1) added. Only asymmetric
  grids have zero points in the files.
- `int-quantized` and `float-quantized`: int8 and FP8 as they are (`compressors/naive_quantized`).
- `nvfp4-pack-quantized` and `mxfp4-pack-quantized`: two FP4 values a byte, the first in its low half
  (`compressors/nvfp4`, `compressors/mxfp4`); the former divides its FP8 scales by one number for the matrix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from app.core.formats.file_format import FileFormat, FormatRefusal, ModuleSchemes, Scheme, StoredTensor, words
from app.core.formats.schemes import CACHES, SCHEMES, CacheName, InputRounding, Scales
from app.core.formats.targets import (
    ANYWHERE,
    compact_patterns,
    expert_names,
    expert_set,
    fused_names,
    matched,
    mixer_names,
)

LAYOUT = "pack-quantized"
MIXED = "mixed-precision"
LAYOUTS = {
    ("int", "plain"): "int-quantized",
    ("float", "plain"): "float-quantized",
    ("float", "e4m3"): "nvfp4-pack-quantized",
    ("float", "e8m0"): "mxfp4-pack-quantized",
}
SCALE_DTYPES = {"e4m3": "F8_E4M3", "e8m0": "U8"}  # as safetensors and torch name them
TORCH_DTYPES = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}
# Whose packing is followed: up to 0.17 the library left two bits of each word unused at 3 bits.
VERSION = "0.20.0"
HALF_BYTE, BYTE = 4, 8  # bits
# Of the arguments of compressed-tensors: what an absent one means.
ABSENT: Mapping[str, Any] = {"symmetric": True, "dynamic": False}
# Of the table of families: types whose files transformers does not open right, and why.
UNOPENED_TYPES = Path(__file__).parent / "transformers_unopened.json"
EXPERTS_LOST = "experts"
UNOPENED = "transformers cannot open compressed-tensors files"


class CompressedTensorsFormat(FileFormat):
    """All schemes, and several in one model."""

    # g_idx is written by others alone: channels out of order, which the reader refuses.
    suffixes = (
        "weight_scale", "weight_packed", "weight", "weight_shape", "weight_zero_point", "weight_global_scale",
        "input_scale", "input_global_scale", "weight_g_idx",
    )  # fmt: skip
    transformers_needs = ("compressed-tensors>=0.15.0",)
    holds_cache_scales = True

    def refusal(self, schemes: set[Scheme]) -> FormatRefusal | None:
        return None

    def shape_refusal(self, out_features: int, in_features: int, scheme: Scheme) -> str | None:
        if out_features % scheme.kind.block_rows:
            return f"out_features={out_features} is not a multiple of {scheme.kind.block_rows}"
        return None

    def tensors(
        self, out_features: int, in_features: int, scheme: Scheme, dtype: str
    ) -> dict[str, StoredTensor]:
        groups, kind = scheme.groups(in_features), scheme.kind
        if layout_of(scheme) == LAYOUT:
            table = {
                "weight_packed": StoredTensor((out_features, words(in_features, scheme.bits)), "I32"),
                "weight_scale": StoredTensor((out_features, groups), dtype),
                "weight_shape": StoredTensor((2,), "I64"),
            }
            if not scheme.symmetric:
                table["weight_zero_point"] = StoredTensor((words(out_features, scheme.bits), groups), "I32")
            return table
        if scheme.bits == HALF_BYTE:
            table = {"weight_packed": StoredTensor((out_features, in_features // 2), "U8")}
        else:
            numbers = "I8" if kind.numbers == "int" else "F8_E4M3"
            table = {"weight": StoredTensor((out_features, in_features), numbers)}
        scales = out_features // kind.block_rows, groups
        table["weight_scale"] = StoredTensor(scales, SCALE_DTYPES.get(kind.scales, dtype))
        if kind.scales == "e4m3":
            table["weight_global_scale"] = StoredTensor((1,), "F32")
        if kind.inputs is not None and kind.inputs.needs_range:
            # vLLM and compressed-tensors have a float32 above FP8 scales, and else the weights' dtype.
            below = kind.inputs.scales == "e4m3"
            table["input_global_scale" if below else "input_scale"] = StoredTensor(
                (1,), "F32" if below else dtype
            )
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
        layouts = {layout_of(scheme) for scheme in schemes}
        return {
            **({"dequantize": True} if dequantize else {}),
            "quant_method": "compressed-tensors",
            "format": layouts.pop() if len(layouts) == 1 else MIXED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [
                *asked_names(modules.unquantized),
                *(f"re:{pattern}" for pattern in (*unquantized_experts(modules), *outside_layers(modules))),
                *(f"re:{tower}" for tower in modules.tower_patterns),
            ],
            "kv_cache_scheme": None if modules.cache is None else input_arguments(CACHES[modules.cache]),
            "global_compression_ratio": None,
            "version": VERSION,
        }

    def loader_notes(self, modules: ModuleSchemes, model_type: str) -> Iterator[str]:
        schemes, experts = modules.distinct, modules.of_experts
        yield from self.scheme_notes(modules)
        if modules.cache is not None:
            yield (
                f"vLLM 0.32 keeps its cache in {modules.cache} for such files, unless kv_cache_dtype names "
                "another; transformers 5.24 with compressed-tensors 0.20 leaves the cache as it is"
            )
        yield from type_notes(modules, model_type)
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
        elif len(experts) > 1 or (None in experts and not modules.fused_experts):
            yield (
                f"{UNOPENED} whose experts have several schemes or keep their precision; let `overrides` and "
                "`ignore` match no experts if it has to"
            )
        if asymmetric and len(schemes) > 1:
            yield (
                f"{UNOPENED} of several asymmetric schemes; leave out the overrides or set symmetric to true "
                "if it has to"
            )

    def scheme_notes(self, modules: ModuleSchemes) -> Iterator[str]:
        """Notes on schemes beside plain integers. The capabilities are those of vLLM 0.32's sources."""
        names = sorted({scheme.name for scheme in modules.distinct if not scheme.is_plain})
        if "w4a8" in names:
            yield "vLLM 0.32 runs w4a8 on GPUs of compute capability 9.0 alone"
        if {"nvfp4", "mxfp4"} & set(names):
            yield "vLLM 0.32 rounds inputs to FP4 from compute capability 10.0 on, and leaves them before"
        if any("fp4" in name for name in names):
            yield "transformers opens FP4 in bfloat16 alone"
        experts = {scheme.name for scheme in modules.of_experts if scheme and not scheme.is_plain}
        unpacked = sorted(name for name in experts if SCHEMES[name].bits == BYTE)
        if unpacked:
            yield f"{UNOPENED} whose experts have scheme {' or '.join(unpacked)}"

    def scheme_in(self, entry: Mapping[str, Any], linear: str) -> Scheme | None:
        for group in (entry.get("config_groups") or {}).values():
            if any(names_linear(target, linear) for target in group.get("targets") or ()):
                return scheme_of_group(group)
        return None

    def cache_in(self, entry: Mapping[str, Any]) -> CacheName | None:
        stored = entry.get("kv_cache_scheme")
        same = (n for n, numbers in CACHES.items() if same_arguments(input_arguments(numbers), stored))
        return next(same, None)

    def unreadable(self, entry: Mapping[str, Any]) -> str | None:
        whole = entry.get("format")
        if whole not in (LAYOUT, MIXED, *LAYOUTS.values()):
            return f"the compressed-tensors format {whole!r} is not read here"
        for group in (entry.get("config_groups") or {}).values():
            layout = group.get("format") or entry.get("format")
            if layout not in (LAYOUT, *LAYOUTS.values()):
                return f"the compressed-tensors format {layout!r} is not read here"
            if scheme_of_group(group) is None:
                return "a config group has numbers of another kind than the schemes that are served here"
        return None


@cache
def unopened_types() -> dict[str, str]:
    """By type, why transformers does not open its files right: EXPERTS_LOST, or its own words."""
    faults: dict[str, str] = json.loads(UNOPENED_TYPES.read_text("utf-8"))
    return faults


def type_notes(modules: ModuleSchemes, model_type: str) -> Iterator[str]:
    """Notes on loaders whose class of the type does not read our files."""
    fault, has_experts = unopened_types().get(model_type), bool(modules.of_experts - {None})
    way = "use another loader"
    if modules.fused_experts:
        way = f"let `ignore` match all experts if it has to, or {way}"
    if fault == EXPERTS_LOST and has_experts:
        yield (
            f"transformers 5.24 opens compressed-tensors files of {model_type} without the quantized "
            f"experts, and gives it random ones without an error; {way}"
        )
    elif fault is not None and fault != EXPERTS_LOST:
        yield (
            f"transformers 5.24 does not open compressed-tensors files of {model_type} ({fault}); use "
            "another loader"
        )
    if model_type == "gpt_oss" and (has_experts or not modules.fused_experts):
        yield (
            "vLLM 0.32's class of gpt_oss loads experts that lie in one tensor a layer, and passes over "
            f"those of compressed-tensors files that have tensors of their own; {way}"
        )


def asked_names(names: Iterable[str]) -> list[str]:
    """The names, with those that servers ask for: of fused matrices, and of experts' linears.

    Beside patterns: vLLM and SGLang rename the modules of plain names where their classes have other names.
    """
    return list(
        dict.fromkeys(
            other
            for name in names
            for other in (name, *fused_names(name), *expert_names(name), *mixer_names(name))
        )
    )


def layout_of(scheme: Scheme) -> str:
    kind = scheme.kind
    packed = (kind.numbers == "int" and scheme.bits < BYTE) or scheme.is_plain
    return LAYOUT if packed else LAYOUTS[kind.numbers, kind.scales]


def unquantized_experts(modules: ModuleSchemes) -> list[str]:
    """Patterns of the experts that keep their precision: vLLM's gpt_oss renames plain `down_proj`."""
    experts = asked_names(name for name in modules.unquantized if expert_set(name) is not None)
    return compact_patterns(experts, asked_names((*modules.linears, *modules.full_precision)))


def outside_layers(modules: ModuleSchemes) -> list[str]:
    """Patterns of what is in no list of layers: vLLM's gemma3n has `altup_projections` in half a decoder."""
    quantized = asked_names(name for name, scheme in modules.linears.items() if scheme is not None)
    patterns = [
        f"^{ANYWHERE}{re.escape(tail[1])}$"
        for name in modules.full_precision
        if (tail := re.fullmatch(r"(?:[^.\d][^.]*\.)+([^.\d][^.]*(?:\.\d+)?)", name))
    ]
    return [pattern for pattern in dict.fromkeys(patterns) if not matched([pattern], quantized)]


def config_group(modules: ModuleSchemes, scheme: Scheme, *, only: bool) -> dict[str, Any]:
    names = asked_names(
        name for name, other in modules.linears.items() if other == scheme and name != modules.head
    )
    patterns = compact_patterns(names, asked_names(name for name in modules.linears if name != modules.head))
    dense = [name for name in names if expert_set(name) is None]
    # vLLM's class of heads is no Linear by its name, so the head has a target of its own.
    has_head = modules.head is not None and modules.linears[modules.head] == scheme
    return {
        "targets": [
            *(["Linear"] if only else [*("re:" + pattern for pattern in patterns), *dense]),
            *(["re:" + modules.head_pattern] if has_head else []),
        ],
        "weights": weight_arguments(scheme),
        "input_activations": input_arguments(scheme.kind.inputs),
        "output_activations": None,
        "format": layout_of(scheme),
    }


def weight_arguments(scheme: Scheme) -> dict[str, Any]:
    """The numbers of weights in the words of compressed-tensors."""
    kind = scheme.kind
    arguments: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": kind.numbers,
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size == -1 else "group",
        "group_size": None if scheme.group_size == -1 else scheme.group_size,
        "actorder": None,
        "dynamic": False,
    }
    if kind.block_rows > 1:
        block = [kind.block_rows, scheme.group_size]
        return {**arguments, "strategy": "block", "group_size": None, "block_structure": block}
    return {**arguments, **scale_arguments(kind.scales)}


def scale_arguments(scales: Scales) -> dict[str, Any]:
    """Of scales that are stored in a dtype of their own."""
    if scales == "plain":
        return {}
    dtype = TORCH_DTYPES[scales]
    strategy = {"strategy": "tensor_group"} if scales == "e4m3" else {}
    return {**strategy, "scale_dtype": dtype, "zp_dtype": dtype}


def input_arguments(inputs: InputRounding | None) -> dict[str, Any] | None:
    """The rounding of inputs in the words of compressed-tensors."""
    if inputs is None:
        return None
    dynamic: bool | str = "local" if inputs.scales == "e4m3" else not inputs.needs_range
    return {
        "num_bits": inputs.bits,
        "type": inputs.numbers,
        "symmetric": True,
        "strategy": inputs.scope,
        "group_size": inputs.group_size,
        "actorder": None,
        "dynamic": dynamic,
        **scale_arguments(inputs.scales),
    }


def names_linear(target: str, linear: str) -> bool:
    """Whether a target of a config group names a linear, as loaders match: `re:` by the beginning."""
    if target.startswith("re:"):
        return re.match(target[3:], linear) is not None
    return target == "Linear" or linear == target or linear.endswith("." + target)


def scheme_of_group(group: Mapping[str, Any]) -> Scheme | None:
    """The scheme that a config group describes; None if it is none of ours."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    size = -1 if weights.get("strategy") == "channel" else weights.get("group_size")
    for name, kind in SCHEMES.items():
        scheme = Scheme(
            bits=kind.bits or weights.get("num_bits") or 0,
            group_size=kind.group_size or size or 0,
            symmetric=bool(weights.get("symmetric", True)),
            name=name,
        )
        if same_arguments(weight_arguments(scheme), weights) and same_arguments(
            input_arguments(kind.inputs), inputs
        ):
            return scheme
    return None


def same_arguments(own: Mapping[str, Any] | None, stored: Mapping[str, Any] | None) -> bool:
    """Whether both describe the same numbers; keys without influence on them may be absent."""
    if own is None or stored is None:
        return not own and not stored
    keys = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "block_structure")
    return all(stored.get(key, ABSENT.get(key)) == own.get(key, ABSENT.get(key)) for key in keys)
