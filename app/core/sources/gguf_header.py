"""The metadata and the tensor table of a GGUF file, read and checked without reading a weight.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Lengths and counts are bounded, whatever
the file says, and each tensor must lie within it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import NamedTuple

from app.core.errors import ModelRefused
from app.core.sources.git_lfs import refuse_pointer
from app.core.sources.json_file import ReadableFiles, refused

Value = int | float | bool | str | tuple[int | float | bool, ...]

VERSIONS = (2, 3)  # the first counted in 32 bits
MAX_HEADER_BYTES = 64 * 1024**2  # vocabularies of 262,144 tokens take 12 MB
MAX_ITEMS = 2**21  # of all arrays of texts together: each is passed over by itself
MAX_KEYS, MAX_TENSORS, MAX_DIMENSIONS = 4096, 65_536, 4
MAX_TEXT_BYTES = 1024**2
MAX_NUMBERS = 1024  # of an array that is remembered
READ_BYTES = 2 * 1024**2
ALIGNMENT = 32
TEXT, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class BlockType(NamedTuple):
    """A tensor type: `values` share a block of `size` bytes."""

    name: str
    values: int
    size: int


# By the number in the file: those that the worker can dequantize.
BLOCK_TYPES = {
    0: BlockType("F32", 1, 4), 1: BlockType("F16", 1, 2), 30: BlockType("BF16", 1, 2),
    2: BlockType("Q4_0", 32, 18), 3: BlockType("Q4_1", 32, 20), 6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24), 8: BlockType("Q8_0", 32, 34), 10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110), 12: BlockType("Q4_K", 256, 144), 13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210), 16: BlockType("IQ2_XXS", 256, 66), 17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98), 19: BlockType("IQ1_S", 256, 50), 20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110), 22: BlockType("IQ2_S", 256, 82), 23: BlockType("IQ4_XS", 256, 136),
    29: BlockType("IQ1_M", 256, 56), 34: BlockType("TQ1_0", 256, 54), 35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
}  # fmt: skip


class GgufTensor(NamedTuple):
    """One entry of the table. `shape` is in PyTorch's order; `start` and `end` are bytes of the file."""

    shape: tuple[int, ...]
    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """Arrays of texts and long arrays of numbers are empty in `metadata`."""

    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]


def damaged(path: str, why: str) -> ModelRefused:
    return refused(
        "model_header_invalid",
        f"{path}: {why}",
        "download or export the file again; it is damaged or not a GGUF file",
    )


class Cursor:
    """The file from its start on, fetched in pieces."""

    def __init__(self, files: ReadableFiles, path: str, size: int) -> None:
        self.files, self.path, self.size = files, path, size
        self.position = 0
        self.fetched, self.start = b"", 0  # `start` is the position of its first byte
        self.items = 0

    def take(self, count: int) -> bytes:
        """The next bytes. Raises ModelRefused past the file's end, and past the largest header."""
        offset = self.position - self.start
        if offset + count > len(self.fetched):
            self.fetch(count)
            offset = 0
        self.position += count
        return self.fetched[offset : offset + count]

    def fetch(self, count: int) -> None:
        end = self.position + count
        if end > self.size:
            raise damaged(self.path, f"the header goes on past the file's {self.size} bytes: it is truncated")
        if end > MAX_HEADER_BYTES:
            raise damaged(self.path, f"the header is longer than {MAX_HEADER_BYTES} bytes")
        self.fetched = self.files.read(
            self.path, self.position, min(max(count, READ_BYTES), self.size - self.position)
        )
        self.start = self.position
        if len(self.fetched) < count:
            raise damaged(self.path, f"it ends at byte {self.start + len(self.fetched)}: it is truncated")

    def number(self, form: str) -> int:
        """An unsigned number: I has 32 bits, Q has 64."""
        value: int = struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]
        return value

    def text(self) -> str:
        length = self.number("Q")
        if length > MAX_TEXT_BYTES:
            raise damaged(self.path, f"a text claims {length} bytes; at most {MAX_TEXT_BYTES} are allowed")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as fault:
            raise damaged(self.path, f"a text is not UTF-8: {fault}") from fault

    def value(self, kind: int) -> Value:
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            return self.array()
        if kind not in NUMBERS:
            raise damaged(self.path, f"a value has the unknown type {kind}")
        form = NUMBERS[kind]
        value: int | float | bool = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]
        return value

    def array(self) -> tuple[int | float | bool, ...]:
        """The numbers of a short array; of others nothing, but they are passed over."""
        kind, count = self.number("I"), self.number("Q")
        if kind == TEXT:
            self.items += count
            if self.items > MAX_ITEMS:
                raise damaged(
                    self.path, f"its arrays claim {self.items} texts; at most {MAX_ITEMS} are allowed"
                )
            for _ in range(count):
                self.take(self.number("Q"))
            return ()
        if kind not in NUMBERS:
            raise damaged(self.path, f"an array has items of the unknown type {kind}")
        form = NUMBERS[kind]
        content = self.take(count * struct.calcsize(f"<{form}"))
        return struct.unpack(f"<{count}{form}", content) if count <= MAX_NUMBERS else ()


def read_gguf_header(files: ReadableFiles, path: str) -> GgufHeader:
    """Raises ModelRefused for a damaged file, and for tensor types that can't be dequantized."""
    cursor = Cursor(files, path, files.list()[path])
    refuse_pointer(path, files.read(path, 0, min(cursor.size, 1024)))
    if cursor.take(4) != b"GGUF":
        raise damaged(path, "it does not begin as a GGUF file")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise refused(
            "gguf_unsupported",
            f"{path} has version {version} of GGUF, or another byte order",
            f"export it again as version {VERSIONS[-1]}, little-endian",
        )
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
        raise damaged(path, f"it claims {tensors} tensors and {keys} keys")
    metadata: dict[str, Value] = {}
    for _ in range(keys):
        key = cursor.text()
        if key in metadata:
            raise damaged(path, f"{key} is there twice")
        metadata[key] = cursor.value(cursor.number("I"))
    return GgufHeader(metadata, tensor_table(cursor, tensors, metadata.get("general.alignment", ALIGNMENT)))


def tensor_table(cursor: Cursor, count: int, alignment: Value) -> dict[str, GgufTensor]:
    """Raises ModelRefused for tensors that overlap or end past the file."""
    if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
        raise damaged(cursor.path, f"general.alignment is {alignment!r}")
    entries = [table_entry(cursor) for _ in range(count)]
    if len({name for name, *_ in entries}) < count:
        raise damaged(cursor.path, "a tensor is there twice")
    base = -(-cursor.position // alignment) * alignment
    tensors, free = {}, base
    for name, shape, block, offset in sorted(entries, key=lambda entry: entry[3]):
        start = base + offset
        end = start + math.prod(shape) // block.values * block.size
        if start < free or offset % alignment:
            raise damaged(cursor.path, f"tensor {name} at byte {start} overlaps another or is not aligned")
        if end > cursor.size:
            raise damaged(
                cursor.path,
                f"tensor {name} ends at byte {end}, but the file has {cursor.size}: it is truncated",
            )
        tensors[name], free = GgufTensor(shape, block.name, start, end), end
    return tensors


def table_entry(cursor: Cursor) -> tuple[str, tuple[int, ...], BlockType, int]:
    """Name, shape, type, and offset from the start of the data."""
    name, dimensions = cursor.text(), cursor.number("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise damaged(cursor.path, f"tensor {name[:200]} has {dimensions} dimensions")
    shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))
    number, offset = cursor.number("I"), cursor.number("Q")
    block = BLOCK_TYPES.get(number)
    if block is None:
        raise refused(
            "gguf_unsupported",
            f"{cursor.path}: tensor {name[:200]} has GGML's type {number}, which can't be dequantized here",
            f"use a file with types among {', '.join(each.name for each in BLOCK_TYPES.values())}",
        )
    if 0 in shape or math.prod(shape) >= 2**63 or shape[-1] % block.values:
        raise damaged(
            cursor.path, f"tensor {name[:200]} has a shape of {list(shape)}, impossible for {block.name}"
        )
    return name, shape, block, offset
