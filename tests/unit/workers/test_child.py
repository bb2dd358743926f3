"""The job child's last word, whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.core.assignment import Assignment
from app.core.specs import JobSpec
from workers.child import run
from workers.progress import ProgressPipe


def messages_of(assignment: Assignment) -> tuple[int, list[dict[str, object]]]:
    """The exit code and what was said."""
    read_end, write_end = os.pipe()
    code = run(assignment, ProgressPipe(write_end))
    os.close(write_end)
    with os.fdopen(read_end) as lines:
        return code, [json.loads(line) for line in lines]


@pytest.fixture
def assignment(tmp_path: Path) -> Assignment:
    return Assignment(
        spec=JobSpec(model="file:///model"),
        model_folder=tmp_path,
        model_name="model",
        model_digest="0" * 64,
        work_folder=tmp_path,
    )


def test_an_absent_backend_fails_the_job(assignment: Assignment) -> None:
    code, messages = messages_of(assignment.model_copy(update={"kernel_backend": "cuda"}))
    assert (code, messages[-1]["kind"]) == (1, "failed")
    assert messages[-1]["error"]["code"] == "kernel_backend_absent"  # type: ignore[index]


def test_a_fault_of_our_own_is_told_and_not_raised(
    assignment: Assignment, capfd: pytest.CaptureFixture[str]
) -> None:
    code, messages = messages_of(assignment)  # the folder holds no model at all
    assert code == 1
    assert [message["kind"] for message in messages] == ["note", "failed"]
    assert messages[-1]["error"]["code"] == "internal"  # type: ignore[index]
    assert "Traceback" in capfd.readouterr().err


def test_a_full_disk_is_the_operators(assignment: Assignment) -> None:
    """The real refusal of a write: files may have no bytes here."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0));"
        "from pathlib import Path; from workers.child import os_fault\n"
        "try: Path(sys.argv[1]).write_text('x')\n"
        "except OSError as fault: print(os_fault(fault).code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(assignment.work_folder / "file")],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.stdout.strip() == "worker_disk"
