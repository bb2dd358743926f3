from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from app.core.errors import Unavailable
from app.core.sources.hub_model import MAX_LISTING_BYTES, limited_body

MIB = 2**20


def pieces(count: int, taken: list[int]) -> Iterator[bytes]:
    for number in range(count):
        taken.append(number)
        yield bytes(MIB)


def test_a_listing_has_a_most_of_bytes_whatever_it_states() -> None:
    most = MAX_LISTING_BYTES // MIB
    taken: list[int] = []
    with pytest.raises(Unavailable, match="larger than"):
        limited_body(httpx.Response(200, content=pieces(2 * most, taken)))
    assert len(taken) == most + 1
    assert len(limited_body(httpx.Response(200, content=pieces(most, [])))) == MAX_LISTING_BYTES
