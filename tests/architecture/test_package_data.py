"""What is no Python is in the wheel only if pyproject.toml says so."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

PACKAGES = ("app", "workers", "kernels")


def test_every_file_of_a_package_is_in_the_wheel(repository: Path) -> None:
    settings = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]
    packed = {
        path.relative_to(repository).as_posix()
        for package, globs in patterns.items()
        for each in globs
        for path in (repository / package.replace(".", "/")).glob(each)
    }
    listed = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=repository, check=True, capture_output=True, text=True
    )
    files = {name for name in listed.stdout.splitlines() if not name.endswith((".py", ".pyi"))}
    assert len(files) > 50
    assert sorted(files - packed) == []
