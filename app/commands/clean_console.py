"""A console that passes on no control character of what it prints.

Names, labels, logs and answers are written by others: a terminal would obey the escape sequences in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# All but tab and newline, and what turns the direction of writing. None has a width: tables stay straight.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # of JSON; no encoding writes it


def printable(text: str) -> str:
    return HALF_CHARACTER.sub("\N{REPLACEMENT CHARACTER}", UNPRINTABLE.sub("", text))


class CleanConsole(Console):
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The console's own colours and cursor moves come later, or are control segments."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
