"""Which texts get a note: the same rule on characters, as the API sees text, and on tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from app.core.sources.text_repetition import LOOKED_AT, RUNS, text_notes

FOLDER = Path(__file__).parents[5] / "workers" / "texts" / "builtin" / "wikitext2"
VALID, TEST = ((FOLDER / f"{split}.txt").read_text("utf-8") for split in ("valid", "test"))
CODE = "\n".join(file.read_text("utf-8") for file in sorted(Path(__file__).parent.glob("*.py")))


def notes(calibration: Sequence[str], evaluation: Sequence[str], unit: str) -> list[str]:
    return list(text_notes(calibration, evaluation, unit))


def in_units(text: str, unit: str) -> Sequence[str]:
    return text if unit == "characters" else text.split()


@pytest.mark.parametrize("unit", RUNS)
@pytest.mark.parametrize(
    ("calibration", "evaluation"), [(VALID, TEST), (TEST, VALID), (CODE, TEST), ("", "")]
)
def test_usual_texts_have_no_note(calibration: str, evaluation: str, unit: str) -> None:
    assert notes(in_units(calibration, unit), in_units(evaluation, unit), unit) == []


@pytest.mark.parametrize("unit", RUNS)
@pytest.mark.parametrize(
    "repeated",
    [
        "The quick brown fox jumps over the lazy dog.\n" * 500,
        "a " * 5000,
        TEST[:3000] * 20,
        TEST[:20_000] * 2,
    ],
    ids=["a line", "a word", "a page", "twice the same"],
)
def test_a_text_that_repeats_itself(repeated: str, unit: str) -> None:
    other = in_units(VALID, unit)
    (note,) = notes(in_units(repeated, unit), other, unit)
    assert note.startswith("the calibration text repeats itself")
    (note,) = notes(other, in_units(repeated, unit), unit)
    assert note.startswith("the evaluation text repeats itself")
    assert f"runs of {RUNS[unit]} {unit}" in note


@pytest.mark.parametrize("unit", RUNS)
def test_evaluation_on_what_was_calibrated_on(unit: str) -> None:
    evaluation = in_units(TEST[:20_000] + VALID[:5000], unit)
    (note,) = notes(in_units(VALID, unit), evaluation, unit)
    assert note.startswith("the recipes are calibrated on evaluation text: ")
    share = int(note.removeprefix("the recipes are calibrated on evaluation text: ").partition("%")[0])
    assert 17 <= share <= 22


def test_a_short_text_is_not_judged() -> None:
    assert notes("a" * (RUNS["characters"] - 1), "", "characters") == []


def test_only_the_start_is_looked_at() -> None:
    assert notes(VALID[:LOOKED_AT] + VALID[:LOOKED_AT] * 3, "", "characters") == []
