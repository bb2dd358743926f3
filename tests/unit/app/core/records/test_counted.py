from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from app.core.records.counted import counted

# Verbs, and units of numbers that are no counts.
NO_NOUNS = {
    "is", "has", "was", "does", "hides", "holds", "lacks", "sends", "finishes", "follows", "stops", "shows",
    "needs", "takes", "reads", "says", "ends", "begins", "lists", "nats", "cores", "tokens", "times", "bits",
}  # fmt: skip


@pytest.mark.parametrize(("count", "said"), [(0, "no jobs"), (1, "1 job"), (2, "2 jobs")])
def test_a_count_with_its_noun(count: int, said: str) -> None:
    assert counted(count, "job") == said


def numbers_before_plurals(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            for value, text in pairwise(node.values):
                words = re.match(r" ([a-z]+s)\b", str(getattr(text, "value", "")))
                if isinstance(value, ast.FormattedValue) and words and words[1] not in NO_NOUNS:
                    yield f"{path.name}:{node.lineno} {ast.unparse(value.value)} {words[1]}"


def test_the_terminal_counts_in_words_of_both_numbers(repository: Path) -> None:
    """`1 servers` comes of a number before a plural that is written out."""
    written = [
        each
        for path in sorted((repository / "app" / "commands").rglob("*.py"))
        for each in numbers_before_plurals(path)
    ]
    assert written == []
