from __future__ import annotations

import pytest

from app.commands.administration import byte_count
from app.core.errors import InvalidRequest


def test_a_size_is_written_with_its_unit() -> None:
    assert (byte_count("500GB"), byte_count("2 TB"), byte_count("0")) == (5 * 10**11, 2 * 10**12, 0)


@pytest.mark.parametrize("written", ["none", "", "5 apples", "-1", "GB"])
def test_what_is_no_size_names_the_option_and_what_it_takes(written: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        byte_count(written)
    assert refusal.value.message == f"--storage {written} is not a size"
    assert refusal.value.remedy == "write it as 500GB or 2TB, or 0 for no limit"
