"""The header of a safetensors file, parsed and checked without reading a weight.

Format: 8 bytes little-endian header length, JSON, then the tensors' bytes
(https://github.com/huggingface/safetensors, section Format).
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from app.core.errors import ModelRefused
from app.core.records.specs import Frozen
from app.core.sources.git_lfs import refuse_pointer
from app.core.sources.json_file import json_fault

MAX_NUMBER = 2**63
MAX_HEADER_BYTES = 100 * 1024**2
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip


# How codes lie: numbers of their own dtype; two FP4 in a byte; integers along rows, less half of their range;
# the words of AWQ and GPTQ, and GPTQ's second version.
Packing = Literal["plain", "fp4", "rows", "awq", "gptq", "gptq_v2"]


class TensorHeader(Frozen):
    """One tensor: `start` and `end` are absolute byte offsets in `file`.

    `dtype` and `shape` are those of its values, which lie there as they are unless `encoding` says in which
    form: that of `quantized` or `merged`, else a type of GGML. `interleaved` is the number of heads in whose
    rows the two halves of rotary pairs alternate there. With `strides`, in values, they lie among others: the
    first at `start`, the last before `end`.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int
    encoding: str | None = None
    interleaved: int = 0
    strides: tuple[int, ...] = ()
    quantized: QuantizedValues | None = None
    merged: MergedValues | None = None

    @property
    def size(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def stored_as(self) -> str:
        """The type of the numbers in the model's files."""
        return self.merged.base.stored_as if self.merged is not None else self.encoding or self.dtype


class QuantizedValues(Frozen):
    """The stored tensors that matrices of `shape` are computed from, one or several below each other.

    A value is (code - zero) * scale, and those of a block (rows, columns) have one scale and one zero. The
    rows of the tensor are those of the matrices from `first_row` on, each `step`-th.
    """

    packing: Packing
    shape: tuple[int, int]
    block: tuple[int, int]
    codes: TensorHeader
    scales: TensorHeader
    bits: int = 8
    zeros: TensorHeader | None = None
    factor: TensorHeader | None = None  # of all scales
    divisor: TensorHeader | None = None  # of all scales
    column_groups: TensorHeader | None = None  # the group of each column, where they are not in order
    stored_shape: TensorHeader | None = None  # a copy of the matrix's shape, to be compared
    first_row: int = 0
    step: int = 1


class MergedValues(Frozen):
    """What an adapter makes of the tensor `base`: `whole` in its stead, plus scale * up @ down.

    `down` is (r, in) and `up` is (out, r); of a `table` of embeddings the product is transposed. With
    `magnitude` each row has that length afterwards (DoRA). All but `base` lie in the adapter's folder; at
    least one of `whole` and the pair `down` and `up` is there.
    """

    base: TensorHeader
    whole: TensorHeader | None = None
    down: TensorHeader | None = None
    up: TensorHeader | None = None
    table: bool = False
    scale: float = 1.0
    magnitude: TensorHeader | None = None


def refuse(file: str, why: str) -> ModelRefused:
    return ModelRefused(
        f"{file}: {why}",
        code="model_header_invalid",
        remedy="download or export the file again; it is damaged or not a safetensors file",
        param="model",
    )


def header_length(file: str, first_bytes: bytes, file_size: int) -> int:
    """The length of the JSON header. `first_bytes` are the file's first eight, or more."""
    refuse_pointer(file, first_bytes)
    if file_size < 8 or len(first_bytes) < 8:
        raise refuse(file, f"{file_size} bytes are too few for a header")
    length = int.from_bytes(first_bytes[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise refuse(file, f"the header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if 8 + length > file_size:
        raise refuse(file, f"the header claims {length} bytes, but the file has {file_size}: it is truncated")
    return length


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def parse_header(file: str, header: bytes, file_size: int) -> dict[str, TensorHeader]:
    """The tensors of a file by name.

    Raises ModelRefused on malformed JSON, unknown dtypes, ranges outside the file, overlaps or gaps.
    """
    try:
        entries = json.loads(header, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as fault:
        raise refuse(file, f"the header is not valid JSON: {json_fault(fault)}") from fault
    if not isinstance(entries, dict):
        raise refuse(file, "the header is not a JSON object")
    metadata = entries.get("__metadata__")
    if metadata is not None and not is_texts(metadata):
        raise refuse(file, "__metadata__ is not an object of texts")
    base = 8 + len(header)
    tensors = {
        name: parse_entry(file, name, entry, base)
        for name, entry in entries.items()
        if name != "__metadata__"
    }
    expected = base
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != expected:
            raise refuse(file, f"tensor {name} starts at byte {tensor.start}, expected {expected}")
        expected = tensor.end
    if expected != file_size:
        raise refuse(file, f"the tensors end at byte {expected}, but the file has {file_size}")
    return tensors


def parse_entry(file: str, name: str, entry: Any, base: int) -> TensorHeader:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise refuse(file, f"tensor {name} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse(file, f"tensor {name} has the unknown dtype {dtype!r}")
    if not natural_numbers(shape) or not natural_numbers(offsets) or len(offsets) != 2:
        raise refuse(file, f"tensor {name} has a malformed shape or offsets")
    start, end = offsets
    # Readers count in 64 bits, also where another dimension is 0.
    if math.prod(filter(None, shape)) >= MAX_NUMBER:
        raise refuse(file, f"tensor {name} has an impossible shape")
    if end - start != math.prod(shape) * DTYPE_BITS[dtype] // 8:
        raise refuse(file, f"tensor {name}: {end - start} bytes do not fit {dtype} {shape}")
    return TensorHeader(dtype=dtype, shape=tuple(shape), file=file, start=base + start, end=base + end)


def is_texts(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def natural_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < MAX_NUMBER for value in values
    )
