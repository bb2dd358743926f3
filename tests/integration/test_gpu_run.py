"""The run for machines with a GPU, on this CPU with tiny sizes: every part leaves its figures."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.benchmarks import gpu

MEASURED = ("facts", "model", "job", "serving", "kernels")
SCRIPT = ("tests/benchmarks/gpu.py", "--device", "cpu", "--tiny")


def test_its_parts_together_take_less_than_eight_minutes() -> None:
    assert {part for together in gpu.ORDER for part in together} == set(gpu.LIMITS)
    assert sum(max(gpu.LIMITS[part] for part in together) for together in gpu.ORDER) < 8 * 60


@pytest.mark.timeout(400)
def test_every_part_leaves_its_figures(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, *SCRIPT, "--out", str(tmp_path), "--only", *MEASURED]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    results = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert done.returncode == 0, {part: result.get("log") for part, result in results.items()}
    assert list(results) == list(MEASURED)
    figures = {part: result["figures"] for part, result in results.items()}
    assert {"calibrating", "searching", "packing"} <= set(figures["job"]["stages"])
    serving = figures["serving"]
    assert 'path="traced"' in serving["steps"]
    assert all(serving[f"concurrency {clients}"]["tokens/s"] > 0 for clients in (1, 3))
    assert serving["first token of 40 ms"] > 0
    assert {row["name"] for row in figures["kernels"]["rows"]} >= {
        "256x256 M 1 torch bf16",
        "256x256 M 1 aten",
    }
    table = (tmp_path / "gpu.md").read_text("utf-8")
    assert "| searching |" in table
    assert "Not measured" not in table


def test_a_part_that_fails_is_named_and_costs_the_others_nothing(repository: Path, tmp_path: Path) -> None:
    """Serving without an artifact: its log's end is in the result."""
    command = [sys.executable, *SCRIPT, "--out", str(tmp_path), "--only", "facts", "serving"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    results = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert done.returncode == 1
    assert results["facts"]["ended"] == "well"
    assert results["serving"]["ended"] == 1
    assert results["serving"]["log"]
    assert "- serving: 1" in (tmp_path / "gpu.md").read_text("utf-8")


def test_wheels_are_unpacked_beside_the_metadata_of_the_project(repository: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("carried.py", "NUMBER = 7\n")
    folder = gpu.unpacked(wheels, tmp_path / "packages")
    program = "import carried, importlib.metadata as m; print(carried.NUMBER, m.version('nibble'))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {program}"],
        capture_output=True, text=True, check=True, cwd=repository,
    )  # fmt: skip
    assert done.stdout.split() == ["7", "0.1.0"]
