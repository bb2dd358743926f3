"""The recorded versions: complete, admitted by pyproject.toml, and used wherever something is installed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
RANGES = {"torch", "nibble"}  # torch follows the host (.ci/install); nibble's extras name each other


def direct_dependencies() -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(line) for group in groups for line in group]
    return [each for each in requirements if canonicalize_name(each.name) not in RANGES]


@pytest.fixture(scope="module")
def recorded() -> list[Requirement]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_each_direct_dependency_has_one_exact_version(recorded: list[Requirement], python: str) -> None:
    for dependency in direct_dependencies():
        versions = [
            next(iter(each.specifier)).version
            for each in recorded
            if canonicalize_name(each.name) == canonicalize_name(dependency.name)
            and (each.marker is None or each.marker.evaluate({"python_version": python}))
        ]
        assert len(versions) == 1, f"{dependency} is not recorded: run `make lock`"
        assert versions[0] in dependency.specifier, f"{versions[0]} is not {dependency}: run `make lock`"


def test_every_line_is_exact(recorded: list[Requirement]) -> None:
    assert [str(each) for each in recorded if {s.operator for s in each.specifier} != {"=="}] == []


def test_what_follows_the_build_of_torch_is_not_recorded(recorded: list[Requirement]) -> None:
    """Else a host with a CUDA build could not install."""
    names = {each.name for each in recorded}
    assert {name for name in names if name.startswith(("nvidia-", "cuda-")) or name == "torch"} == set()


@pytest.mark.parametrize("file", [".ci/install", "docker/api.Dockerfile", "docker/worker.Dockerfile"])
def test_whatever_installs_reads_them(file: str) -> None:
    text = (REPOSITORY / file).read_text()
    assert "constraints.txt" in text
    installs = [line for line in text.splitlines() if " install " in line and "pip" in line]
    bounded = ("-c ", "--constraint ", "torch>=")
    free = [line for line in installs if not any(word in line for word in bounded)]
    # The package itself comes without its dependencies, which are there by then.
    assert [line for line in free if "--no-deps ." not in line] == []
