"""One name for one thing: classes, modules, and values that have a name of their own."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

CODE = ("app", "workers", "kernels")
MAX_REPEATED_FILES = 10  # base names such as jobs.py: a module of the API and one of the terminal
VAGUE = frozenset({"told", "made", "known", "found", "kept", "given", "wanted", "place", "part", "piece"})


def modules(repository: Path) -> list[Path]:
    return [path for folder in CODE for path in sorted((repository / folder).rglob("*.py"))]


@pytest.fixture(scope="module")
def trees(repository: Path) -> dict[str, ast.Module]:
    return {
        path.relative_to(repository).as_posix(): ast.parse(path.read_text()) for path in modules(repository)
    }


def test_a_class_name_stands_once(trees: dict[str, ast.Module]) -> None:
    names = Counter(
        node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_few_files_share_a_name(repository: Path) -> None:
    names = Counter(path.name for path in modules(repository) if path.name != "__init__.py")
    assert len([name for name, count in names.items() if count > 1]) <= MAX_REPEATED_FILES


def bound_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name


def test_values_have_names_of_their_own(trees: dict[str, ast.Module]) -> None:
    vague = [
        f"{path}:{line} {name}"
        for path, tree in trees.items()
        for line, name in bound_names(tree)
        if name in VAGUE
    ]
    assert vague == []


def test_classes_of_the_glossary_exist(repository: Path, trees: dict[str, ast.Module]) -> None:
    page = (repository / "docs" / "glossary.md").read_text()
    named = set(re.findall(r"`([A-Z][A-Za-z]+)`", page))
    classes = {
        node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    }
    assert named
    assert named - classes == set()
