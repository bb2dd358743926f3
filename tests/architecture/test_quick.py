from __future__ import annotations

from pathlib import Path

import pytest

from tests.quick import MOST_IMPORTERS, judges

MIRROR = "tests/unit/app/core"


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A repository of unit tests, each of which imports what is written beside it."""
    imports = {
        "app/core/jobs/test_store.py": "from app.core.jobs.store import JobStore",
        "app/core/jobs/test_store_pages.py": "",
        "app/core/jobs/test_queue.py": "import app.core.jobs.queue\nfrom app.core.jobs import keys",
        "app/test_client.py": "",
        **{f"workers/test_{number}.py": "from app.core.errors import Conflict" for number in range(20)},
    }
    for name, source in imports.items():
        path = tmp_path / "tests" / "unit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        ("app/core/jobs/store.py", ["app/core/jobs/test_store.py", "app/core/jobs/test_store_pages.py"]),
        ("app/core/jobs/queue.py", ["app/core/jobs/test_queue.py"]),
        ("app/core/jobs/keys.py", ["app/core/jobs/test_queue.py"]),
        (
            "app/core/jobs/untested.py",
            [
                "app/core/jobs/test_queue.py",
                "app/core/jobs/test_store.py",
                "app/core/jobs/test_store_pages.py",
            ],
        ),
        ("app/client/calls.py", ["app/test_client.py"]),
        ("tests/unit/app/test_client.py", ["app/test_client.py"]),
        ("app/core/errors.py", []),
        ("docs/api.md", []),
    ],
)
def test_a_change_is_judged_by_the_tests_nearest_to_it(house: Path, changed: str, tests: list[str]) -> None:
    assert judges([changed], house) == [f"tests/unit/{name}" for name in tests]


def test_what_half_the_tests_import_runs_only_its_own(house: Path) -> None:
    assert MOST_IMPORTERS < 20
    path = house / "tests/unit/app/core/test_errors.py"
    path.write_text("")
    assert judges(["app/core/errors.py"], house) == ["tests/unit/app/core/test_errors.py"]


def test_every_module_here_with_a_mirror_runs_it(repository: Path) -> None:
    assert f"{MIRROR}/jobs/test_job_store.py" in judges(["app/core/jobs/job_store.py"], repository)
    assert f"{MIRROR}/upkeep/test_janitor.py" in judges(["app/core/upkeep/janitor.py"], repository)
