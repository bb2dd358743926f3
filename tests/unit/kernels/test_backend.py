"""The choice of a backend is explicit."""

from __future__ import annotations

import pytest

from kernels.backend import select_backend


@pytest.mark.parametrize("requested", ["auto", "torch"])
def test_the_backend_says_why_it_was_chosen(requested: str) -> None:
    backend = select_backend(requested)
    assert backend.name == "torch"
    assert backend.reason


def test_an_absent_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'cuda' is not installed; available: auto, torch"):
        select_backend("cuda")
