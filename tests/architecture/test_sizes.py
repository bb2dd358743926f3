"""Limits on the length of functions and files: the tail is what makes code hard to read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 600
MAX_PARAMETERS = 5
BANNED_IN_NAMES = ("util", "helper", "manager", "common", "misc", "processor")
# Kernel bodies are long by nature. The parameters of a command are its options, one on each line.
EXEMPT_FROM_LENGTH = ("kernels/triton_backend/",)
COMMANDS = "app/commands/"
EXEMPT_FROM_PARAMETERS = (COMMANDS, "kernels/")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(repository: Path) -> list[Path]:
    return [
        path for part in ("app", "workers", "kernels") for path in sorted((repository / part).rglob("*.py"))
    ]


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def lines(function: Function, name: str) -> int:
    """Lines from `def` to the end; of a command without its list of options."""
    assert function.end_lineno is not None
    first = function.body[0].lineno if name.startswith(COMMANDS) else function.lineno
    return function.end_lineno - first + 1


def parameters(function: Function) -> int:
    names = [
        argument.arg
        for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        if argument.arg not in {"self", "cls"}
    ]
    return len(names)


def relative(path: Path, repository: Path) -> str:
    return path.relative_to(repository).as_posix()


def test_no_function_is_long(repository: Path) -> None:
    long = [
        f"{name}:{function.lineno} {function.name}: {lines(function, name)} lines"
        for path in sources(repository)
        if not (name := relative(path, repository)).startswith(EXEMPT_FROM_LENGTH)
        for function in functions(path)
        if lines(function, name) > MAX_FUNCTION_LINES
    ]
    assert not long


def test_no_file_is_long(repository: Path) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in sources(repository)}
    long = [
        f"{relative(path, repository)}: {count}" for path, count in lengths.items() if count > MAX_FILE_LINES
    ]
    assert not long


def test_no_function_takes_many_parameters(repository: Path) -> None:
    wide = [
        f"{relative(path, repository)}:{function.lineno} {function.name}: {parameters(function)}"
        for path in sources(repository)
        if not relative(path, repository).startswith(EXEMPT_FROM_PARAMETERS)
        for function in functions(path)
        if parameters(function) > MAX_PARAMETERS
    ]
    assert not wide


def test_names_say_what_things_are(repository: Path) -> None:
    drawers = [
        relative(path, repository)
        for path in sources(repository)
        if any(word in path.stem for word in BANNED_IN_NAMES)
    ]
    assert not drawers


@pytest.mark.parametrize(("folder", "most"), [("app/core", 18), ("workers", 14)])
def test_a_floor_has_few_rooms(repository: Path, folder: str, most: int) -> None:
    rooms = [path.name for path in (repository / folder).iterdir() if not path.name.startswith("__")]
    assert len(rooms) <= most, f"a new one belongs into one of {', '.join(sorted(rooms))}"
