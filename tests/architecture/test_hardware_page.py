"""The tables of the hardware guide are those that recommendations and notes rest on."""

from __future__ import annotations

import json

from docs.write_hardware import BEGIN, END, PAGE, page, tables


def test_the_tables_of_the_guide_are_the_planners() -> None:
    text = PAGE.read_text("utf-8")
    assert text == page(), "run `python -m docs.write_hardware`"
    between = text.partition(BEGIN)[2].partition(END)[0]
    assert between.strip() == tables()
    assert "| `w4a8` |" in between
    assert json.dumps(between).count("\\u2264") > 20  # bounds are marked as such
