"""What the documentation tells people to type works, and its pages are whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from docs import draw_plots
from tests.e2e.installed import Service, running_service

EXECUTED = re.compile(r"<!-- executed -->\n```sh\n(.*?)```", re.DOTALL)


@pytest.fixture
def service(tmp_path: Path, example_model: Path) -> Iterator[Service]:
    with running_service(tmp_path, example_model.parent) as running:
        yield running


@pytest.mark.timeout(480)
def test_the_tutorial_and_the_recipe_guide_can_be_typed(
    service: Service, repository: Path, tmp_path: Path
) -> None:
    pages = ("tutorial.md", "guides/recipes.md")
    blocks = [block for page in pages for block in EXECUTED.findall((repository / "docs" / page).read_text())]
    assert len(blocks) == 6
    folder = tmp_path / "tutorial"
    folder.mkdir()
    (folder / "examples").symlink_to(repository / "examples")
    programs = Path(sys.executable).parent
    typed = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        env={**service.environment, "PATH": f"{programs}:{os.environ['PATH']}"},
        cwd=folder, capture_output=True, text=True, check=False, timeout=420,
    )  # fmt: skip
    assert typed.returncode == 0, typed.stdout + typed.stderr
    assert "parameters" in typed.stdout
    assert "awq+gptq w4 g128" in typed.stdout
    assert '"object":"chat.completion"' in typed.stdout.replace('": "', '":"')


def test_the_site_builds_without_a_warning(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "tutorial" / "index.html").exists()


def test_plots_and_table_of_the_recipe_guide_come_from_the_figures() -> None:
    original, rows = draw_plots.measured()
    assert original > 1
    assert len(rows) >= 16
    for name, text in draw_plots.drawings().items():
        dots = ElementTree.fromstring(text).findall("{http://www.w3.org/2000/svg}circle")
        assert len(dots) >= len(rows), name
    page = draw_plots.guide()
    assert all(f"| {row.setting} |" in page and f"{row.kl:.5f}" in page for row in rows)


@pytest.mark.parametrize("writer", ["write_api", "write_errors", "write_settings"])
def test_a_page_that_is_made_is_what_the_sources_say(writer: str, repository: Path) -> None:
    program = f"from docs.{writer} import PAGE, page; assert page() == PAGE.read_text('utf-8')"
    compared = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=False
    )
    assert compared.returncode == 0, f"run `python docs/{writer}.py`\n{compared.stderr}"


def test_meanings_of_settings_are_those_of_the_example(repository: Path) -> None:
    """`GET /v1/settings` shows them; the example is in no wheel."""
    program = (
        "from docs.write_settings import MEANINGS as path, meanings\n"
        "assert meanings() == path.read_text('utf-8')"
    )
    compared = subprocess.run([sys.executable, "-c", program], cwd=repository, check=False)
    assert compared.returncode == 0, "run `python docs/write_settings.py`"


# Codes of notes in events and plans; what the client says where no service answers; what a stand-in says.
NO_ERRORS = {
    "checkpoint_damaged", "devices", "rates_assumed", "reused", "unused_tensors", "service_unreachable",
    "kernel_missing",
}  # fmt: skip


def test_the_catalogue_has_each_code_that_a_test_expects(repository: Path) -> None:
    """Tests meet the codes of a running service, the catalogue is read from its sources."""
    asserted = re.compile(r'(?:\.code|\["code"\]) == "([a-z_]+)"')
    expected = {
        code
        for file in (repository / "tests").rglob("test_*.py")
        for code in asserted.findall(file.read_text("utf-8"))
    }
    page = (repository / "docs" / "errors.md").read_text("utf-8")
    listed = set(re.findall(r"^\| `([a-z_]+)`", page, re.MULTILINE))
    assert len(expected) > 50
    assert sorted(expected - listed - NO_ERRORS) == []
    assert not re.findall(r"^\| `[a-z_]+` \|  \|", page, re.MULTILINE)  # each has its status
