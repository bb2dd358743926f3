"""Tables that never cut a cell: what has no room is folded, left out, or turned over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

GAP = 2  # columns between two cells
FOLDED = 14  # least width of a cell that may be folded


class Column(NamedTuple):
    """Written as `heading`, after `>` if it is aligned to the right and never folded, `!` if it is never
    folded, `?` if it is left out where there is no room, or says nothing in any row."""

    heading: str
    to_right: bool
    is_whole: bool
    is_spare: bool

    @classmethod
    def of(cls, written: str) -> Column:
        heading = written.lstrip(">!?")
        marks = written[: len(written) - len(heading)]
        return cls(heading, ">" in marks, ">" in marks or "!" in marks, "?" in marks)


class WholeTable:
    """Rows of markup below headings; rich prints it."""

    def __init__(self, columns: Sequence[str], title: str | None = None, *, turns: bool = False) -> None:
        """One that `turns` is turned over where its columns have no room beside each other."""
        self.turns = turns
        self.columns = [Column.of(written) for written in columns]
        self.title = title
        self.rows: list[tuple[str, ...]] = []

    @property
    def row_count(self) -> int:
        return len(self.rows)

    def add_row(self, *cells: str) -> None:
        self.rows.append((*cells, *[""] * (len(self.columns) - len(cells))))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        numbers = [
            number
            for number, column in enumerate(self.columns)
            if not column.is_spare or any(row[number] for row in self.rows)
        ]
        while total([self.least(number) for number in numbers]) > width:
            spare = [number for number in numbers if self.columns[number].is_spare]
            if not spare:
                break
            numbers.remove(spare[-1])
        least = total([self.least(number) for number in numbers])
        if least > width and self.turns:
            yield from self.turned(width)
        else:
            # Wider than the terminal rather than cut: it wraps the line itself.
            wide = max(width, least)
            yield from console.render(self.upright(numbers, wide), options.update(width=wide))

    def natural(self, number: int) -> int:
        """The width of a column's longest line."""
        lines = [self.columns[number].heading]
        for row in self.rows:
            lines += Text.from_markup(row[number]).plain.split("\n")
        return max(map(cell_len, lines))

    def least(self, number: int) -> int:
        natural = self.natural(number)
        return natural if self.columns[number].is_whole else min(natural, FOLDED)

    def upright(self, numbers: Sequence[int], width: int) -> Table:
        """The table with these columns; the widest of those that may be folded give way."""
        widths = {number: self.natural(number) for number in numbers}
        least = {number: self.least(number) for number in numbers}
        while total(widths.values()) > width:
            widest = max(
                (number for number in numbers if widths[number] > least[number]), key=widths.__getitem__
            )
            widths[widest] -= 1
        grid = bare_grid(self.title)
        for number in numbers:
            column = self.columns[number]
            grid.add_column(
                column.heading, justify="right" if column.to_right else "left", width=widths[number],
                overflow="fold",
            )  # fmt: skip
        for row in self.rows:
            grid.add_row(*[row[number] for number in numbers])
        return grid

    def turned(self, width: int) -> RenderResult:
        """Headings down the side, and rows beside each other: the first, and as many others as fit."""
        side = max(cell_len(column.heading) for column in self.columns)
        first, others, title = self.rows[0], self.rows[1:], self.title
        while True:
            block = [first]
            while others and (len(block) == 1 or across(side, [*block, others[0]]) <= width):
                block.append(others.pop(0))
            yield turned_block(self.columns, block, title, max(width, across(side, block)))
            title = None
            if not others:
                return


def total(widths: Iterable[int]) -> int:
    """The width of columns with gaps between them."""
    listed = list(widths)
    return sum(listed) + GAP * (len(listed) - 1)


def across(side: int, rows: Iterable[Sequence[str]]) -> int:
    """The width of headings and of rows as columns."""
    return total([side, *(max(cell_len(Text.from_markup(cell).plain) for cell in row) for row in rows)])


def bare_grid(title: str | None) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False,
        padding=(0, GAP, 0, 0),
    )  # fmt: skip


def turned_block(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str | None, width: int
) -> Table:
    grid = bare_grid(title)
    grid.width = width if across(0, rows) > width else None
    grid.add_column(columns[0].heading, no_wrap=True)
    for row in rows:
        grid.add_column(row[0], justify="right", overflow="fold")
    for number, column in enumerate(columns[1:], 1):
        cells = [row[number] for row in rows]
        if any(cells):
            grid.add_row(column.heading, *cells)
    return grid
