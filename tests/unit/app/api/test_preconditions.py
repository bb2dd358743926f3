from __future__ import annotations

import pytest

from app.api.preconditions import (
    MAX_WAIT_S,
    ByteRange,
    UnsatisfiableRange,
    matches_tag,
    preferred_wait,
    requested_range,
)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-9", ByteRange(0, 10)),
        ("bytes=90-", ByteRange(90, 100)),
        ("bytes=-10", ByteRange(90, 100)),
        ("bytes=-1000", ByteRange(0, 100)),
        ("bytes=50-1000", ByteRange(50, 100)),
        ("Bytes = 1 - 1", ByteRange(1, 2)),
        (None, None),
        ("bytes=-", None),
        ("bytes=5-4", None),
        ("bytes=0-1,5-6", None),
        ("lines=0-1", None),
        ("bytes=x-y", None),
    ],
)
def test_ranges(header: str | None, expected: ByteRange | None) -> None:
    assert requested_range(header, 100) == expected


@pytest.mark.parametrize(("header", "size"), [("bytes=100-", 100), ("bytes=-0", 100), ("bytes=0-0", 0)])
def test_a_range_without_bytes_is_unsatisfiable(header: str, size: int) -> None:
    with pytest.raises(UnsatisfiableRange):
        requested_range(header, size)


@pytest.mark.parametrize(
    ("header", "expected"),
    [(None, False), ('"1"', True), ('W/"1"', True), ('"0", "1"', True), ("*", True), ('"2"', False)],
)
def test_entity_tags(header: str | None, expected: bool) -> None:
    assert matches_tag(header, '"1"') is expected


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("wait=5", 5),
        ("respond-async, wait = 7", 7),
        ("wait=99999", MAX_WAIT_S),
        ("wait=soon", None),
    ],
)
def test_preferences(header: str | None, expected: int | None) -> None:
    assert preferred_wait(header) == expected
