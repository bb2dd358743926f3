from __future__ import annotations

import pytest
from pydantic import ValidationError

from app.core.access.limits import Limits


def test_a_whole_number_is_an_integer_however_json_writes_it() -> None:
    assert Limits.model_validate({"active_jobs": 44.0, "requests_per_minute": 3}).active_jobs == 44


@pytest.mark.parametrize("value", [44.5, "44", True, float("inf"), -1.0])
def test_anything_else_is_none(value: object) -> None:
    with pytest.raises(ValidationError):
        Limits.model_validate({"active_jobs": value})
