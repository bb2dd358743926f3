"""The process that brings the data of tasks: who gets one, what it sees, what its reason becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.core.child.task_process import fetch_task_data
from app.core.errors import TextRefused

REFUSING = """
import os, sys
hub = {name: value for name, value in os.environ.items() if name.startswith(("HF_", "NIBBLE_", "AWS_"))}
print("downloading")
print(f"task_unknown: {sys.argv[1:]} {sorted(hub)}", file=sys.stderr)
sys.exit(1)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "refusing_data.py").write_text(REFUSING)
    (tmp_path / "lost_data.py").write_text("import os; os._exit(7)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[5]}")
    for name in ("HF_TOKEN", "NIBBLE_S3_SECRET", "AWS_SECRET_ACCESS_KEY", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "secret")
    return "refusing_data"


def test_bundled_tasks_need_no_process(tmp_path: Path, module: str) -> None:
    calls: list[int] = []
    fetch_task_data(("builtin:continuation",), tmp_path, calls.append, module=module)
    fetch_task_data((), tmp_path, calls.append, module=module)
    assert calls == []


def test_the_reason_of_the_process_is_the_refusal(tmp_path: Path, module: str) -> None:
    with pytest.raises(TextRefused) as caught:
        fetch_task_data(("builtin:continuation", "arc"), tmp_path, lambda count: None, module=module)
    assert (caught.value.code, caught.value.param) == ("task_unknown", "evaluation.tasks")
    assert caught.value.message == "['arc'] ['HF_TOKEN']"


def test_a_process_that_dies_is_a_refusal_too(tmp_path: Path, module: str) -> None:
    with pytest.raises(TextRefused, match="exit code 7"):
        fetch_task_data(("arc",), tmp_path, lambda count: None, module="lost_data")


def test_a_job_that_is_stopped_ends_the_process(tmp_path: Path, module: str) -> None:
    (tmp_path / "endless_data.py").write_text("import time; time.sleep(600)")

    def stop(count: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        fetch_task_data(("arc",), tmp_path, stop, module="endless_data")
