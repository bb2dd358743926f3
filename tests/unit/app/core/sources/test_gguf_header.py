"""GGUF files in order, and each kind of damage and lie by itself."""

from __future__ import annotations

import struct
from collections.abc import Callable

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.errors import ModelRefused
from app.core.sources.gguf_header import (
    BLOCK_TYPES,
    MAX_ITEMS,
    MAX_TEXT_BYTES,
    GgufHeader,
    read_gguf_header,
)
from app.core.sources.gguf_model import gguf_model


class OneFile:
    """A folder with one file of these bytes; it counts what is read."""

    name = "here"

    def __init__(self, content: bytes, size: int | None = None) -> None:
        self.content, self.size, self.bytes_read = content, size or len(content), 0

    def list(self) -> dict[str, int]:
        return {"m.gguf": self.size}

    def read(self, path: str, start: int, length: int) -> bytes:
        self.bytes_read += length
        return self.content[start : start + length]


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def entry(name: str, shape: tuple[int, ...], kind: int = 3, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def number(key: str, value: int) -> bytes:
    return pair(key, 4, struct.pack("<I", value))


ARCHITECTURE = pair("general.architecture", 8, text("llama"))
KEYS = [
    ARCHITECTURE,
    *(
        number(f"llama.{key}", value)
        for key, value in {
            "block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32,
            "attention.head_count": 2,
        }.items()
    ),
    pair("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b")),
    pair("tokenizer.ggml.scores", 9, struct.pack("<IQff", 6, 2, 0.5, 1.0)),
]  # fmt: skip
EMBEDDING = entry("token_embd.weight", (32, 4))


def file(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    data: int = 128,
) -> bytes:
    keys, tensors = KEYS if keys is None else keys, [EMBEDDING] if tensors is None else tensors
    header = magic + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join((*keys, *tensors))
    return header + bytes(-len(header) % 32) + bytes(data)


def read(content: bytes) -> GgufHeader:
    return read_gguf_header(OneFile(content), "m.gguf")


def test_a_file_in_order_is_read() -> None:
    header = read(file())
    tensor = header.tensors["token_embd.weight"]
    assert (tensor.shape, tensor.kind, tensor.end - tensor.start) == ((4, 32), "Q4_1", 4 * 20)
    assert tensor.start % 32 == 0
    assert header.metadata["llama.embedding_length"] == 32
    assert header.metadata["tokenizer.ggml.tokens"] == ()
    assert header.metadata["tokenizer.ggml.scores"] == (0.5, 1.0)
    config, tensors = gguf_model("m.gguf", header)
    assert (config["vocab_size"], config["tie_word_embeddings"], config["head_dim"]) == (4, True, 16)
    assert tensors["model.embed_tokens.weight"].size == 4 * 32 * 2  # as float16


def test_types_and_sizes_are_those_of_the_library_that_decodes_them() -> None:
    for kind, block in BLOCK_TYPES.items():
        described = gguf.GGMLQuantizationType(kind)
        assert (described.name, gguf.GGML_QUANT_SIZES[described]) == (block.name, (block.values, block.size))
        if block.name not in ("F32", "F16"):
            assert described in gguf.quants._type_traits


MILLIONS = struct.pack("<IQ", 8, MAX_ITEMS + 1)
HUGE = struct.pack("<Q", 2**62)
DAMAGE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "another file": lambda: file(magic=b"GGML"),
    "cut in the header": lambda: file()[:100],
    "cut in the data": lambda: file(data=79),
    "a long key": lambda: file([HUGE + b"x"]),
    "a text above the limit": lambda: file([pair("a", 8, text(b"x" * (MAX_TEXT_BYTES + 1)))]),
    "a text in no UTF-8": lambda: file([pair("a", 8, text(b"\xff"))]),
    "an unknown type of value": lambda: file([pair("a", 13, b"")]),
    "an array of arrays": lambda: file([pair("a", 9, struct.pack("<IQ", 9, 1))]),
    "an endless array": lambda: file([pair("a", 9, struct.pack("<IQ", 4, 2**62))]),
    "millions of texts": lambda: file([pair("a", 9, MILLIONS + bytes(8 * MAX_ITEMS + 8))]),
    "a key twice": lambda: file([ARCHITECTURE, ARCHITECTURE]),
    "an odd alignment": lambda: file([*KEYS, number("general.alignment", 12)]),
    "no alignment": lambda: file([*KEYS, number("general.alignment", 0)]),
    "a tensor twice": lambda: file(tensors=[EMBEDDING, entry("token_embd.weight", (32, 1), offset=96)]),
    "tensors that overlap": lambda: file(tensors=[EMBEDDING, entry("output.weight", (32, 1), offset=64)]),
    "a tensor between": lambda: file(tensors=[entry("output.weight", (32, 1), offset=8)]),
    "a tensor beyond": lambda: file(tensors=[entry("output.weight", (32, 1), offset=2**40)]),
    "no dimension": lambda: file(tensors=[entry("output.weight", ())]),
    "five dimensions": lambda: file(tensors=[entry("output.weight", (32, 1, 1, 1, 1))]),
    "an empty tensor": lambda: file(tensors=[entry("output.weight", (32, 0))]),
    "an impossible shape": lambda: file(tensors=[entry("output.weight", (2**40, 2**40))]),
    "half a block": lambda: file(tensors=[entry("output.weight", (16, 2))]),
    "counts beyond all bounds": lambda: b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(damage: str) -> None:
    with pytest.raises(ModelRefused) as refusal:
        read(DAMAGE[damage]())
    assert refusal.value.code == "model_header_invalid"
    assert refusal.value.message.startswith("m.gguf: ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: file(version=1), "version 1"),
        (lambda: b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "another byte order"),
        (lambda: file(tensors=[entry("output.weight", (32, 1), kind=36)]), "GGML's type 36"),
    ],
)
def test_what_is_not_read_is_refused_in_words(content: Callable[[], bytes], words: str) -> None:
    with pytest.raises(ModelRefused, match=words) as refusal:
        read(content())
    assert refusal.value.code == "gguf_unsupported"


def test_only_the_header_is_fetched() -> None:
    """Of a file of a terabyte, a few megabytes."""
    files = OneFile(file(tensors=[entry("token_embd.weight", (2**20, 2**20))]), size=2**40)
    assert read_gguf_header(files, "m.gguf").tensors["token_embd.weight"].end < 2**40
    assert files.bytes_read < 2**22


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(position=st.integers(0, len(file()) - 1), value=st.integers(0, 255), cut=st.booleans())
def test_a_changed_byte_is_refused_or_read(position: int, value: int, cut: bool) -> None:
    content = bytearray(file())
    content[position] = value
    refusal = None
    try:
        gguf_model("m.gguf", read(bytes(content[:position] if cut else content)))
    except ModelRefused as fault:
        refusal = fault
    # What remains after the last tensor's end may be missing.
    assert refusal is not None or not cut or position >= len(content) - 48


@pytest.mark.parametrize(
    ("keys", "tensors", "code", "words"),
    [
        ([pair("general.architecture", 8, text("mamba"))], None, "architecture_unsupported", "'mamba'"),
        ([number("general.architecture", 1)], None, "architecture_unsupported", "'1'"),
        ([*KEYS, number("llama.expert_count", 8)], None, "gguf_unsupported", "llama.expert_count is '8'"),
        ([*KEYS, pair("llama.rope.scaling.type", 8, text("yarn"))], None, "gguf_unsupported", "yarn"),
        ([*KEYS, number("llama.rope.dimension_count", 8)], None, "gguf_unsupported", "not the 16 of a head"),
        (KEYS, [EMBEDDING, entry("rope_freqs.weight", (8,), 0, 96)], "gguf_unsupported", "rope_freqs.weight"),
        (KEYS, [EMBEDDING, entry("blk.0.attn_q.bias", (8,), 0, 96)], "gguf_unsupported", "blk.0.attn_q.bias"),
        (KEYS, [EMBEDDING, entry("blk.00.attn_q.weight", (32, 1), 3, 96)], "gguf_unsupported", "blk.00"),
        (
            KEYS,
            [EMBEDDING, entry("blk.0.attn_q.weight", (32, 1), offset=96)],
            "model_header_invalid",
            "2 heads",
        ),
        (KEYS, [entry("output.weight", (32, 1))], "weights_missing", "token_embd.weight"),
        (KEYS[:-3], None, "model_config_invalid", "attention.head_count is None"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(
    keys: list[bytes], tensors: list[bytes] | None, code: str, words: str
) -> None:
    with pytest.raises(ModelRefused) as refusal:
        gguf_model("m.gguf", read(file(keys, tensors)))
    assert refusal.value.code == code
    assert words in refusal.value.message
