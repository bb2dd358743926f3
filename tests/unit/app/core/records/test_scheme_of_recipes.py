"""Which schemes a recipe may name, and with what beside them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.core.formats.schemes import SCHEMES, SchemeName
from app.core.records.specs import Recipe


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "wna16"])
def test_a_scheme_fixes_its_numbers_and_survives_the_record(name: SchemeName) -> None:
    recipe, kind = Recipe(scheme=name), SCHEMES[name]
    assert (recipe.bits, recipe.group_size, recipe.symmetric) == (kind.bits, kind.group_size, kind.symmetric)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert recipe.label == f"awq {name}"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_alone_have_a_name_with_their_bits(bits: int) -> None:
    recipe = Recipe.model_validate({"scheme": f"w{bits}a16", "group_size": 64})
    assert recipe == Recipe.model_validate({"bits": bits, "group_size": 64})


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"scheme": "fp8", "bits": 4}, "scheme fp8 has bits 8: leave `bits` out"),
        ({"scheme": "w4a16", "bits": 8}, "scheme w4a16 has bits 4"),
        ({"scheme": "nvfp4", "group_size": 32}, "scheme nvfp4 has group_size 16"),
        ({"scheme": "w8a8", "symmetric": False}, "scheme w8a8 has symmetric true"),
        ({"scheme": "fp8", "method": "omniquant"}, "omniquant learns integer grids"),
        ({"group_size": 16}, "groups of 16 belong to scheme nvfp4"),
        ({"scheme": "fp8", "overrides": [{"match": "up_proj", "bits": 4}]}, "scheme fp8 has 8 bits"),
        ({"scheme": "nvfp4", "overrides": [{"match": "up_proj", "group_size": 32}]}, "has group_size 16"),
        ({"scheme": "int5"}, "Input should be 'wna16'"),
    ],
)
def test_what_does_not_go_together_is_refused(body: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Recipe.model_validate(body)


def test_the_last_override_decides() -> None:
    recipe = Recipe.model_validate(
        {
            "group_size": 128,
            "overrides": [
                {"match": "re:.*proj", "bits": 8},
                {"match": "down_proj", "scheme": "fp8"},
                {"match": "up_proj", "scheme": "mxfp4a16"},
            ],
        }
    )
    schemes = [recipe.scheme_of(f"mlp.{name}") for name in ("gate_proj", "down_proj", "up_proj")]
    assert [(each.name, each.bits, each.group_size, each.symmetric) for each in schemes] == [
        ("wna16", 8, 128, False), ("fp8", 8, -1, True), ("mxfp4a16", 4, 32, True),
    ]  # fmt: skip
