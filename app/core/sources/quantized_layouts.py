"""The layouts of quantized weights: which stored tensors make a plain one, and how. No weight is read.

Sources: transformers 5.24.0 (`integrations/finegrained_fp8.py`, `mxfp4.py`, `fbgemm_fp8.py`), with whose
dequantized weights the tests compare; compressed-tensors 0.20 (`compressors`), likewise; vLLM 0.33.0
(`modelopt.py`); AutoAWQ and GPTQModel as in `app/core/formats`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from app.core.errors import ModelRefused
from app.core.formats.file_format import WORD_BITS, words
from app.core.records.patterns import check_pattern
from app.core.sources.json_file import refused
from app.core.sources.safetensors_header import Packing, QuantizedValues, TensorHeader

FP8 = {"F8_E4M3": "FP8", "F8_E5M2": "FP8 (e5m2)"}
FLOATS = ("F32", "BF16", "F16")
EXPONENTS = ("U8", "F8_E8M0")
INTEGER_BITS = (2, 3, 4, 8)  # that kernels unpack
MXFP4_GROUP = 32
# Endings of a weight's scales in files of `quant_method` fp8: DeepSeek-V4 and Mistral have the last two.
FP8_SCALES = ("_scale_inv", ".scale", ".qscale_weight")
MAX_PATTERNS = 256  # of config_groups
RESTORE = "download the model again, or submit the original model"

PlainTensors = Iterator[tuple[str, TensorHeader]]  # plain tensors by name


def invalid(message: str, remedy: str = RESTORE) -> ModelRefused:
    return refused("quantized_source_invalid", message, remedy)


class StoredTensors:
    """The tensors of a model's files; what is taken for a weight is used up."""

    def __init__(self, tensors: Mapping[str, TensorHeader], dtype: str) -> None:
        self.tensors, self.dtype = tensors, dtype
        self.used: set[str] = set()

    def ending(self, suffix: str) -> list[str]:
        """The names with the ending, without it."""
        return [name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix)]

    def optional(self, name: str) -> TensorHeader | None:
        tensor = self.tensors.get(name)
        if tensor is not None:
            self.used.add(name)
        return tensor

    def take(self, name: str, beside: str, dtypes: tuple[str, ...]) -> TensorHeader:
        """A tensor that belongs to the stored tensor `beside`. Raises ModelRefused without it."""
        tensor = self.optional(name)
        if tensor is None:
            raise invalid(
                f"{name} is missing beside {beside}: without it nobody can tell the weight's values"
            )
        if tensor.dtype not in dtypes:
            raise invalid(f"{name} is {tensor.dtype}; expected {' or '.join(dtypes)}")
        return tensor

    def plain(self, shape: tuple[int, ...], encoding: str, values: QuantizedValues) -> TensorHeader:
        codes = values.codes
        if 0 in shape:
            raise invalid(f"a weight in {codes.file} has the shape {list(shape)}, without any value")
        return TensorHeader(
            dtype=self.dtype, shape=shape, file=codes.file, start=codes.start, end=codes.end,
            encoding=encoding, quantized=values,
        )  # fmt: skip


def expect(name: str, tensor: TensorHeader, *shapes: tuple[int, ...]) -> TensorHeader:
    """The tensor. Raises ModelRefused unless it has one of the shapes."""
    if tensor.shape not in shapes:
        shapes_text = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise invalid(f"{name} has the shape {list(tensor.shape)}; its weight needs {shapes_text}")
    return tensor


def scale_block(
    name: str, shape: tuple[int, ...], scales: TensorHeader, blocks: tuple[tuple[int, int], ...] = ()
) -> tuple[int, int]:
    """The rows and columns of a weight of `shape` that share a scale.

    One scale for the whole, one for each row, for whole groups of a row, or for one of `blocks`, of which the
    last of a row or column may be cut. Raises ModelRefused for scales of another shape.
    """
    *outer, rows, columns = shape
    stored = scales.shape
    if math.prod(stored) == math.prod(outer) and stored in ((), (1,), tuple(outer), (*outer, 1, 1)):
        return rows, columns
    for height, width in (*blocks, (1, columns)):
        if stored == (*outer, -(-rows // height), -(-columns // width)):
            return height, width
    if stored == (*outer, rows):
        return 1, columns
    if stored[:-1] == shape[:-1] and stored[-1] and columns % stored[-1] == 0:
        return 1, columns // stored[-1]
    blocked = "".join(f", nor one in blocks of {height}x{width}" for height, width in blocks)
    raise invalid(
        f"{name} has the shape {list(stored)}, which does not fit a weight of {list(shape)}: neither one "
        f"scale nor one for each row or group{blocked}"
    )


def with_scope(numbers: str, shape: tuple[int, ...], block: tuple[int, int]) -> str:
    """The numbers, and what shares a scale, in words."""
    if block == shape[-2:]:
        return f"{numbers} with one scale"
    if block[0] > 1:
        return f"{numbers} in blocks of {block[0]}x{block[1]}"
    return f"{numbers} by row" if block[1] == shape[-1] else f"{numbers} in groups of {block[1]}"


def fp8_weights(stored: StoredTensors, entry: Mapping[str, Any]) -> PlainTensors:
    """FP8 with scales in blocks, or one for each matrix; of experts also FP4 in bytes."""
    blocks = block_sizes(entry.get("weight_block_size"))
    for name, codes in stored.tensors.items():
        ends = (scale_name(name, end) for end in FP8_SCALES)
        scale = next((each for each in ends if each in stored.tensors), None)
        is_fp8 = codes.dtype in FP8 and len(codes.shape) >= 2
        if not is_fp8 and (scale is None or codes.dtype != "I8"):
            continue
        stored.used.add(name)
        scales = stored.take(scale or f"{name}_scale_inv", name, (*FLOATS, *EXPONENTS))
        if is_fp8:
            yield name, blocked_floats(stored, name, codes, scales, blocks)
        else:
            yield name, fp4(stored, name, codes, scales, "MXFP4")


def scale_name(weight: str, end: str) -> str:
    return weight + end if end.startswith("_") else weight.removesuffix(".weight") + end


def block_sizes(value: object) -> tuple[tuple[int, int], ...]:
    """The one size of blocks in an entry of config.json, or none."""
    if value is None:
        return ()
    if isinstance(value, list) and len(value) == 2 and all(type(each) is int and each > 0 for each in value):
        return ((value[0], value[1]),)
    raise invalid(f"config.json: blocks of {str(value)[:100]}; expected two positive integers")


def blocked_floats(
    stored: StoredTensors,
    name: str,
    codes: TensorHeader,
    scales: TensorHeader,
    blocks: tuple[tuple[int, int], ...] = (),
) -> TensorHeader:
    """FP8, or int8, as it is."""
    block = scale_block(f"the scale of {name}", codes.shape, scales, blocks)
    values = QuantizedValues(
        packing="plain", shape=(codes.shape[-2], codes.shape[-1]), block=block, codes=codes, scales=scales
    )
    return stored.plain(codes.shape, with_scope(FP8.get(codes.dtype, "int8"), codes.shape, block), values)


def fp4(
    stored: StoredTensors,
    name: str,
    codes: TensorHeader,
    scales: TensorHeader,
    numbers: str,
    **over: TensorHeader,
) -> TensorHeader:
    """Two FP4 in a byte along each row."""
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    group = 16 if numbers == "NVFP4" else MXFP4_GROUP
    expect(f"the scale of {name}", scales, (*shape[:-1], -(-shape[-1] // group)))
    values = QuantizedValues(
        packing="fp4",
        shape=(shape[-2], shape[-1]),
        block=(1, group),
        codes=codes,
        scales=scales,
        bits=4,
        **over,
    )
    return stored.plain(shape, numbers, values)


def row_fp8_weights(stored: StoredTensors, entry: Mapping[str, Any]) -> PlainTensors:
    """FP8 with a scale for each row."""
    for name, codes in stored.tensors.items():
        if codes.dtype in FP8 and len(codes.shape) >= 2:
            if len(codes.shape) > 2:
                raise invalid(
                    f"{name} holds experts in FP8 by row, which are not read", "submit the original model"
                )
            stored.used.add(name)
            scales = stored.take(f"{name}_scale", name, FLOATS)
            yield name, blocked_floats(stored, name, codes, scales)


def mxfp4_weights(stored: StoredTensors, entry: Mapping[str, Any]) -> PlainTensors:
    """Experts' matrices of gpt-oss: (experts, rows, groups, 16) bytes, and an exponent for each group.

    The tensors are (experts, out, in); transformers' own are transposed.
    """
    for name in stored.ending("_blocks"):
        codes = stored.take(f"{name}_blocks", name, ("U8",))
        scales = stored.take(f"{name}_scales", f"{name}_blocks", EXPONENTS)
        if len(codes.shape) < 3 or codes.shape[-1] * 2 != MXFP4_GROUP:
            raise invalid(f"{name}_blocks has the shape {list(codes.shape)}; its last size must be 16")
        *outer, groups, half = codes.shape
        yield (
            name,
            fp4(stored, name, codes.model_copy(update={"shape": (*outer, groups * half)}), scales, "MXFP4"),
        )


def awq_weights(stored: StoredTensors, entry: Mapping[str, Any]) -> PlainTensors:
    for name in stored.ending(".qweight"):
        first = f"{name}.qweight"
        codes = stored.take(first, first, ("I32",))
        columns, packed = matrix(first, codes)
        rows, group = packed * WORD_BITS // 4, group_size(entry, columns, first)
        groups = -(-columns // group)
        zeros = stored.take(f"{name}.qzeros", first, ("I32",))
        scales = stored.take(f"{name}.scales", first, FLOATS)
        values = QuantizedValues(
            packing="awq", shape=(rows, columns), block=(1, group), bits=4, codes=codes,
            scales=expect(f"{name}.scales", scales, (groups, rows)),
            zeros=expect(f"{name}.qzeros", zeros, (groups, packed)),
        )  # fmt: skip
        scope = with_scope("int4", values.shape, values.block)
        yield f"{name}.weight", stored.plain(values.shape, f"AWQ, {scope}", values)


def gptq_weights(stored: StoredTensors, entry: Mapping[str, Any]) -> PlainTensors:
    """Channels in any order: g_idx names the group of each."""
    packing: Packing = "gptq_v2" if entry.get("checkpoint_format") == "gptq_v2" else "gptq"
    for name in stored.ending(".qweight"):
        first = f"{name}.qweight"
        codes = stored.take(first, first, ("I32",))
        packed, rows = matrix(first, codes)
        order = stored.optional(f"{name}.g_idx")
        bits = entry.get("bits")
        if order is not None and len(order.shape) == 1 and order.shape[0]:
            bits = packed * WORD_BITS // order.shape[0]
        if bits not in INTEGER_BITS:
            raise invalid(
                f"{first} holds {bits!r} bits a weight; {', '.join(map(str, INTEGER_BITS))} are read",
                "submit the original model",
            )
        columns = packed * WORD_BITS // bits
        scales = stored.take(f"{name}.scales", first, FLOATS)
        groups = matrix(f"{name}.scales", scales)[0]
        zeros = stored.take(f"{name}.qzeros", first, ("I32",))
        group = group_size(entry, columns, first) if order is None else -(-columns // groups)
        expect(f"{name}.scales", scales, (-(-columns // group), rows))
        values = QuantizedValues(
            packing=packing, shape=(rows, columns), block=(1, group), bits=bits, codes=codes, scales=scales,
            zeros=expect(f"{name}.qzeros", zeros, (groups, words(rows, bits))),
            column_groups=order if order is None else expect(f"{name}.g_idx", order, (columns,)),
        )  # fmt: skip
        scope = with_scope(f"int{bits}", values.shape, values.block)
        yield f"{name}.weight", stored.plain(values.shape, f"GPTQ, {scope}", values)


def matrix(name: str, tensor: TensorHeader) -> tuple[int, int]:
    """Its shape. Raises ModelRefused unless it is a matrix that is not empty."""
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise invalid(f"{name} has the shape {list(tensor.shape)}; expected a matrix")
    return tensor.shape[0], tensor.shape[1]


def group_size(entry: Mapping[str, Any], columns: int, name: str) -> int:
    """Of config.json, as a number of columns."""
    size = entry.get("group_size", -1)
    if type(size) is not int or (size <= 0 and size != -1):
        raise invalid(f"config.json: group_size is {str(size)[:100]!r}; expected a positive integer or -1")
    if size != -1 and columns % size:
        raise invalid(f"{name} has {columns} inputs, which group_size {size} of config.json does not divide")
    return columns if size == -1 else size


def compressed_weights(stored: StoredTensors, entry: Mapping[str, Any]) -> PlainTensors:
    """The layouts of compressed-tensors. Which one a linear has shows in its tensors."""
    groups = ConfigGroups(entry)
    for name in stored.ending(".weight_packed"):
        first = f"{name}.weight_packed"
        codes = stored.take(first, first, ("I32", "U8"))
        matrix(first, codes)
        stored.optional(f"{name}.weight_shape")
        if codes.dtype == "I32":
            yield f"{name}.weight", packed_integers(stored, name, codes, groups.weights_of(name))
            continue
        divisor = stored.optional(f"{name}.weight_global_scale")
        if divisor is None:
            scales = stored.take(f"{name}.weight_scale", first, EXPONENTS)
            yield f"{name}.weight", fp4(stored, name, codes, scales, "MXFP4")
        else:
            scales = stored.take(f"{name}.weight_scale", first, ("F8_E4M3",))
            expect(f"{name}.weight_global_scale", divisor, (), (1,))
            yield f"{name}.weight", fp4(stored, name, codes, scales, "NVFP4", divisor=divisor)
    for name in stored.ending(".weight"):
        codes = stored.tensors[f"{name}.weight"]
        if codes.dtype in (*FP8, "I8"):
            stored.used.add(f"{name}.weight")
            yield f"{name}.weight", naive(stored, name, codes, groups.weights_of(name))


def naive(
    stored: StoredTensors, name: str, codes: TensorHeader, arguments: Mapping[str, Any]
) -> TensorHeader:
    """Numbers that PyTorch has a dtype for."""
    scales = stored.take(f"{name}.weight_scale", f"{name}.weight", (*FLOATS, "U8"))
    blocks = block_sizes(arguments.get("block_structure"))
    plain = blocked_floats(stored, f"{name}.weight", codes, scales, blocks)
    zeros = stored.optional(f"{name}.weight_zero_point")
    if zeros is None or plain.quantized is None:
        return plain
    if zeros.dtype != codes.dtype or zeros.shape != scales.shape:
        raise invalid(
            f"{name}.weight_zero_point is {zeros.dtype} of the shape {list(zeros.shape)}, unlike its scale"
        )
    return plain.model_copy(update={"quantized": plain.quantized.model_copy(update={"zeros": zeros})})


def packed_integers(
    stored: StoredTensors, name: str, codes: TensorHeader, arguments: Mapping[str, Any]
) -> TensorHeader:
    """`pack-quantized`. How many inputs a row of words has is known from its groups, else from its bits."""
    bits, size = arguments.get("num_bits"), arguments.get("group_size")
    if bits not in INTEGER_BITS:
        raise invalid(
            f"{name}: num_bits of its config group is {str(bits)[:100]!r}; "
            f"{', '.join(map(str, INTEGER_BITS))} are read",
            "submit the original model",
        )
    scales = stored.take(f"{name}.weight_scale", f"{name}.weight_packed", FLOATS)
    rows, packed = codes.shape
    columns = packed * WORD_BITS // bits
    if arguments.get("strategy") in ("group", "tensor_group") and type(size) is int and size > 0:
        columns = size * matrix(f"{name}.weight_scale", scales)[1]
    expect(f"{name}.weight_packed", codes, (rows, words(columns, bits)))
    block = scale_block(f"{name}.weight_scale", (rows, columns), scales)
    zeros = stored.optional(f"{name}.weight_zero_point")
    if zeros is not None:
        expect(f"{name}.weight_zero_point", zeros, (words(rows, bits), -(-columns // block[1])))
    order = stored.optional(f"{name}.weight_g_idx")
    values = QuantizedValues(
        packing="rows", shape=(rows, columns), block=block, bits=bits, codes=codes, scales=scales,
        zeros=zeros,
        column_groups=order if order is None else expect(f"{name}.weight_g_idx", order, (columns,)),
        stored_shape=stored.tensors.get(f"{name}.weight_shape"),
    )  # fmt: skip
    return stored.plain((rows, columns), with_scope(f"int{bits}", (rows, columns), block), values)


class ConfigGroups:
    """The groups of compressed-tensors' config that quantize weights, by the linears that they name."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        """Raises ModelRefused if there are none, or for patterns that could take very long."""
        named = entry.get("config_groups")
        self.groups: list[Mapping[str, Any]] = []
        self.names: dict[str, Mapping[str, Any]] = {}
        self.patterns: list[tuple[re.Pattern[str], Mapping[str, Any]]] = []
        for group in named.values() if isinstance(named, dict) else ():
            targets = group.get("targets") if isinstance(group, dict) else None
            if isinstance(targets, list) and isinstance(group.get("weights"), dict):
                self.add(group["weights"], [target for target in targets if isinstance(target, str)])
        if not self.groups:
            raise invalid("config.json: quantization_config has no config_groups with weights")

    def add(self, weights: Mapping[str, Any], targets: list[str]) -> None:
        self.groups.append(weights)
        for target in targets:
            pattern = target.removeprefix("re:")
            if pattern == target:
                self.names.setdefault(target, weights)
                continue
            try:
                check_pattern(pattern)
            except ValueError as fault:
                raise invalid(f"config.json: config_groups: {fault}", "submit the original model") from fault
            self.patterns.append((re.compile(pattern), weights))
        if len(self.patterns) > MAX_PATTERNS:
            raise invalid(
                f"config.json: config_groups have more than {MAX_PATTERNS} patterns",
                "name linears without patterns there",
            )

    def weights_of(self, name: str) -> Mapping[str, Any]:
        """The arguments for a linear's weights: of the only group, or one that names it or all linears."""
        if len(self.groups) == 1:
            return self.groups[0]
        by_pattern = (weights for pattern, weights in self.patterns if pattern.match(name))
        weights = self.names.get(name) or next(by_pattern, self.names.get("Linear"))
        if weights is None:
            raise invalid(f"config.json: no group of quantization_config.config_groups names {name}")
        return weights


def modelopt_weights(stored: StoredTensors, entry: Mapping[str, Any]) -> PlainTensors:
    """FP8, and NVFP4 whose scales are multiplied by one number for the matrix."""
    for name in stored.ending(".weight"):
        first = f"{name}.weight"
        codes = stored.tensors[first]
        if codes.dtype not in (*FP8, "U8"):
            continue
        stored.used.add(first)
        if codes.dtype == "U8":
            matrix(first, codes)
            scales = stored.take(f"{name}.weight_scale", first, ("F8_E4M3",))
            factor = stored.take(f"{name}.weight_scale_2", first, ("F32",))
            expect(f"{name}.weight_scale_2", factor, (), (1,))
            yield first, fp4(stored, first, codes, scales, "NVFP4", factor=factor)
        else:
            scales = stored.take(f"{name}.weight_scale", first, FLOATS)
            yield first, blocked_floats(stored, first, codes, scales)
