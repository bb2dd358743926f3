"""Headers that lie: each kind of lie by itself."""

from __future__ import annotations

import json

import pytest

from app.core.errors import ModelRefused
from app.core.sources.safetensors_header import MAX_HEADER_BYTES, header_length, parse_header


def entry(start: int = 0, end: int = 8, *, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> object:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def parse(header: object, data_bytes: int) -> dict[str, object]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return dict(parse_header("f", text, 8 + len(text) + data_bytes))


def test_a_header_in_order_is_read() -> None:
    assert set(parse({"a": entry(), "b": entry(8, 16)}, 16)) == {"a", "b"}


@pytest.mark.parametrize(
    ("header", "data_bytes"),
    [
        ({"a": entry(), "b": entry(4, 12)}, 12),
        ({"a": entry(), "b": entry()}, 8),
        ({"a": entry(4, 12)}, 12),
        ({"a": entry()}, 4),
        ({"a": entry()}, 12),
        ({"a": entry(shape=(3,))}, 8),
        ({"a": entry(dtype="F16")}, 8),
        ({"a": entry(dtype="PICKLE")}, 8),
        ({"a": entry(8, 0, shape=(-2,))}, 8),
        ({"a": entry(0, 0, shape=(2**62, 2**62, 0))}, 0),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {"dtype": "F32", "shape": [2], '
         b'"data_offsets": [0, 8]}}', 8),
    ],
    ids=["overlap", "twice", "gap", "beyond", "rest", "shape", "dtype", "unknown", "negative", "impossible",
         "duplicate"],
)  # fmt: skip
def test_a_header_that_lies_is_refused(header: object, data_bytes: int) -> None:
    with pytest.raises(ModelRefused) as refusal:
        parse(header, data_bytes)
    assert refusal.value.code == "model_header_invalid"


def test_a_header_has_a_most_of_bytes() -> None:
    claimed = (MAX_HEADER_BYTES + 1).to_bytes(8, "little")
    with pytest.raises(ModelRefused, match="at most"):
        header_length("f", claimed, 2**40)
    with pytest.raises(ModelRefused, match="truncated"):
        header_length("f", (100).to_bytes(8, "little"), 50)
