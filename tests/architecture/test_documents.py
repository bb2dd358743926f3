"""Documents that a reader trusts: the tree of modules, the README's commands."""

from __future__ import annotations

import re
from pathlib import Path

from app.cli import ENTRIES

TREE_LINE = re.compile(r"^(?P<indent> *)(?P<name>[\w.-]+/?)(  +\S.*)?$")
CODE_FOLDERS = ("app", "workers", "kernels")


def tree_block(repository: Path) -> list[str]:
    page = (repository / "docs" / "architecture.md").read_text()
    block = page.partition("<!-- tree -->\n```text\n")[2].partition("\n```")[0]
    assert block, "docs/architecture.md lacks its tree"
    return block.splitlines()


def tree_paths(lines: list[str]) -> set[str]:
    """Paths of the tree: two spaces of indentation for each folder."""
    paths: set[str] = set()
    folders: list[str] = []
    for line in lines:
        match = TREE_LINE.match(line)
        assert match, f"not a line of the tree: {line!r}"
        depth = len(match["indent"]) // 2
        folders = [*folders[:depth], match["name"].rstrip("/")]
        paths.add("/".join(folders))
    return paths


def test_every_path_of_the_tree_exists(repository: Path) -> None:
    missing = sorted(path for path in tree_paths(tree_block(repository)) if not (repository / path).exists())
    assert not missing


def test_every_module_is_in_the_tree(repository: Path) -> None:
    modules = {
        path.relative_to(repository).as_posix()
        for folder in CODE_FOLDERS
        for path in (repository / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert not sorted(modules - tree_paths(tree_block(repository)))


def test_the_modules_of_the_walks_exist(repository: Path) -> None:
    page = (repository / "docs" / "architecture.md").read_text()
    walks = page.partition("## Two walks")[2].partition("## Modules")[0]
    named = re.findall(r"`((?:app|workers|kernels)/[\w/]+\.py)`", walks)
    assert len(named) > 30
    assert [name for name in named if not (repository / name).exists()] == []


def test_every_command_is_in_the_readme(repository: Path) -> None:
    readme = (repository / "README.md").read_text()
    assert [name for name in ENTRIES if f"`nibble {name}" not in readme] == []
