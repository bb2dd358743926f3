"""Phrases that readers took for translated stay away from what people read: commands and the dashboard."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

# What was read, and what the products of this field say.
PHRASES = (
    "Workers that live", "No worker lives", "Takes / Runs", "Not now", "Keep it", "Start anew",
    "Name that clients ask for", "What it takes", "The way to the target", "Beside the worst", "Own time",
    "It failed", "It can't be served", "Longest answer", "the first that can of", "Highest ratio",
    "This form has the first", "so many likeliest", "is no size", "is no object",
    "nobody can be asked", "nothing is known of", "had begun with it", "a further name", "also called",
    "hears of the job", "made before, by", "as the server does by itself", "take away of", "goes on after",
)  # fmt: skip
SPOKEN = re.compile("|".join(re.escape(phrase) for phrase in PHRASES), re.IGNORECASE)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of what a file shows: strings of Python without docstrings, lines of the dashboard."""
    if path.suffix != ".py":
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if not line.lstrip().startswith(("//", "/*", "*")):
                yield number, line
        return
    tree = ast.parse(path.read_text("utf-8"))
    silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            yield node.lineno, node.value


def readable(repository: Path) -> list[Path]:
    assets = repository / "app" / "dashboard" / "assets"
    written = [
        path for kind in ("*.js", "*.html") for path in assets.rglob(kind) if "vendor" not in path.parts
    ]
    return sorted([*(repository / "app" / "commands").rglob("*.py"), *written])


def test_translated_phrases_do_not_come_back(repository: Path) -> None:
    paths = readable(repository)
    assert {path.suffix for path in paths} >= {".py", ".js"}
    shown = [
        f"{path.relative_to(repository)}:{number}: {text.strip()}"
        for path in paths
        for number, text in texts(path)
        if SPOKEN.search(text)
    ]
    assert shown == []


@pytest.mark.parametrize("text", ["No worker lives here", "LONGEST ANSWER (tokens)", "a further name"])
def test_the_phrases_are_recognised(text: str) -> None:
    assert SPOKEN.search(text)
