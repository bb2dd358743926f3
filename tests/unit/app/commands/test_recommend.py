"""What `nibble recommend` shows, of answers as the service gives them."""

from __future__ import annotations

import pytest

from app.commands.job_options import JobOptions, job_body
from app.commands.recommend import show_recommendation
from app.core.jobs.recommendation import Recommendation
from app.core.records.specs import JobSpec
from tests.unit.app.commands.test_show import text_of
from tests.unit.app.core.jobs.test_recommendation import recommended


def shown(found: Recommendation) -> str:
    return " ".join(text_of(show_recommendation, found.model_dump(mode="json")).split())


def test_the_recipe_stands_first_with_its_size_and_room() -> None:
    found = recommended("h100", "24GB", sequences=14)
    text = shown(found)
    assert found.recommended is not None
    assert "NVIDIA H100 SXM, 22.1 GB of memory to use" in text
    assert "fp8 + FP8 cache rtn rows 9.1 GB 8.0" in text
    assert f"1. fp8: {found.recommended.why[:40]}" in text
    assert text.index("1. fp8") < text.index("w4a16: four bits") < text.index("not nvfp4:")
    assert all(note.split(";")[0][:40] in text for note in found.notes)


def test_what_is_ruled_out_is_shown_where_nothing_fits() -> None:
    text = shown(recommended("h100", "3GB"))
    assert text.count("exceed the 2.8 GB that may be used") > 5
    assert "nothing fits: the smallest file is w2a16" in text


@pytest.mark.parametrize(
    ("options", "section"),
    [
        ({"serve_on": "h100"}, {"serve_on": "h100"}),
        ({"max_size": "18GB"}, {"target": {"max_size": "18GB"}}),
        (
            {"max_size": "18GB", "max_ratio": 1.01},
            {"target": {"max_size": "18GB", "max_perplexity_ratio": 1.01}},
        ),
    ],
)
def test_options_name_a_device_and_a_size(options: dict[str, object], section: dict[str, object]) -> None:
    body = job_body("hf:a/b", JobOptions(**options))  # type: ignore[arg-type]  # values of several types
    assert body == {"model": "hf:a/b", **section}
    JobSpec.model_validate(body)
