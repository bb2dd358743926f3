from __future__ import annotations

from app.api.least_recent import LeastRecent


def test_what_was_used_least_recently_goes_first() -> None:
    values: LeastRecent[str, int] = LeastRecent(2)
    values.put("a", 1)
    values.put("b", 2)
    assert values.get("a") == 1
    values.put("c", 3)
    assert [values.get(key) for key in "abc"] == [1, None, 3]
    values.drop("a")
    values.drop("a")
    assert [values.get(key) for key in "abc"] == [None, None, 3]


def test_values_have_a_most_of_bytes_together() -> None:
    values: LeastRecent[str, bytes] = LeastRecent(9, most_bytes=10, bytes_of=len)
    values.put("a", b"x" * 6)
    values.put("a", b"x" * 7)  # in place of the first
    values.put("b", b"x" * 3)
    assert [values.get(key) for key in "ab"] == [b"x" * 7, b"x" * 3]
    values.put("c", b"x")
    assert [values.get(key) for key in "abc"] == [None, b"x" * 3, b"x"]
    values.put("d", b"x" * 11)  # alone too large
    assert [values.get(key) for key in "abcd"] == [None] * 4
    values.put("e", b"x" * 10)
    assert values.get("e") == b"x" * 10
