from __future__ import annotations

import io

import pytest
from rich.console import Console

from app.commands.terminal import table

ID = "job_" + "0" * 26


def shown(width: int, *columns: str, rows: list[tuple[str, ...]], turns: bool = False) -> list[str]:
    grid = table(*columns, turns=turns)
    for row in rows:
        grid.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=width, soft_wrap=True, highlight=False).print(grid)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_what_may_be_left_out_goes_first_from_the_end() -> None:
    columns, row = ("!job", "!state", "?!age", "?!stage"), (ID, "running 40%", "3 min", "calibrating")
    assert shown(80, *columns, rows=[row])[0].split() == ["job", "state", "age", "stage"]
    assert shown(60, *columns, rows=[row])[0].split() == ["job", "state", "age"]
    assert shown(45, *columns, rows=[row])[0].split() == ["job", "state"]


def test_a_spare_column_that_says_nothing_is_left_out() -> None:
    assert shown(80, "!job", "?tags", rows=[(ID, "")])[0] == "job"


def test_long_cells_are_folded_and_ids_are_whole() -> None:
    lines = shown(50, "!job", "model", rows=[(ID, "a-model-with-a-long-name-and-no-spaces")])
    assert lines[1].startswith(f"{ID}  a-model")
    assert "".join(line[32:].strip() for line in lines[1:]) == "a-model-with-a-long-name-and-no-spaces"
    assert max(map(len, lines)) <= 50


@pytest.mark.parametrize("width", [20, 10])
def test_an_id_is_whole_where_it_has_no_room(width: int) -> None:
    assert ID in "\n".join(shown(width, "!job", rows=[(ID,)]))


def test_figures_are_turned_over_rather_than_cut() -> None:
    columns = ["!candidate", *[f">figure {number}" for number in range(9)]]
    rows = [
        (name, *[f"{number}.12345" for number in range(9)])
        for name in ("original", "awq w4", "rtn w3", "gptq w4")
    ]
    wide = shown(200, *columns, rows=rows, turns=True)
    assert len(wide) == 5
    narrow = shown(36, *columns, rows=rows, turns=True)
    assert max(map(len, narrow)) <= 36
    text = "\n".join(narrow)
    for _, *figures in rows:
        assert all(figure in text for figure in figures)
    assert "…" not in text
    assert [line.split() for line in narrow if line.startswith("candidate")] == [
        ["candidate", "original", "awq", "w4"], ["candidate", "original", "rtn", "w3"],
        ["candidate", "original", "gptq", "w4"],
    ]  # fmt: skip
