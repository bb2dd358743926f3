"""The job's body: what a recipe may combine, and what it is called."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from app.core.specs import Recipe


@pytest.mark.parametrize(
    ("changes", "label", "gptq", "clip"),
    [
        ({"method": "rtn"}, "rtn w4 g128", False, False),
        ({}, "awq w4 g128", False, True),
        ({"rounding": "gptq", "bits": 3}, "awq+gptq w3 g128", True, True),
        ({"method": "gptq", "group_size": -1, "symmetric": True}, "gptq w4 channel sym", True, True),
        ({"method": "gptq", "search": {"clip": False}}, "gptq w4 g128", True, False),
    ],
)
def test_a_recipe_says_how_it_rounds(changes: dict[str, object], label: str, gptq: bool, clip: bool) -> None:
    recipe = Recipe.model_validate(changes)
    assert (recipe.label, recipe.rounds_with_gptq, recipe.searches_clip) == (label, gptq, clip)


def test_plain_rounding_is_not_gptq_rounding() -> None:
    with pytest.raises(ValidationError, match="use method gptq"):
        Recipe.model_validate({"method": "rtn", "rounding": "gptq"})
