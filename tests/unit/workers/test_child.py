"""The job child's last word, whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.core.child.assignment import Assignment
from app.core.specs import JobSpec
from kernels.cuda.driver import DriverError
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


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), "out_of_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
         "out_of_memory"),
        (torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
         "device_failed"),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), "device_failed"),
        (RuntimeError("CUDA error: an illegal memory access was encountered\nmore"), "device_failed"),
        (DriverError("cuLaunchKernelEx failed with 719 (CUDA_ERROR_LAUNCH_FAILED)"), "device_failed"),
        (RuntimeError("shape '[3]' is invalid for input of size 4"), "internal"),
        (OSError(28, "No space left on device"), "worker_disk"),
        (OSError(2, "No such file"), "internal"),
    ],
)  # fmt: skip
def test_faults_of_the_device_are_told_apart(
    assignment: Assignment, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("workers.child.JobRun", broken)
    status, messages = messages_of(assignment)
    told = messages[-1]["error"]
    assert isinstance(told, dict)
    assert (status, told["code"], bool(told["remedy"])) == (1, code, True)
    assert "\n" not in told["message"]


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
