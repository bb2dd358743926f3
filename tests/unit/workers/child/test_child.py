"""The job child's last word, whatever happens."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from app.core.child.assignment import Assignment, Failed
from app.core.child.job_child import JobChild
from app.core.records.specs import JobSpec
from kernels.cuda.driver import DriverError
from tests.small_disk import small_disk
from tests.tiny_models import assignment as tiny_assignment
from tests.tiny_models import tiny_model, tiny_spec
from workers.child.__main__ import run
from workers.child.progress_pipe import ProgressPipe


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
        calibration_digest="0" * 64,
        work_folder=tmp_path,
    )


def test_an_absent_backend_fails_the_job(assignment: Assignment) -> None:
    code, messages = messages_of(assignment.model_copy(update={"kernel_backend": "cuda"}))
    assert (code, messages[-1]["kind"]) == (1, "failed")
    assert messages[-1]["error"]["code"] == "kernel_backend_absent"  # type: ignore[index]


def test_a_fault_of_our_own_is_told_and_not_raised(
    assignment: Assignment, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.child.job_run.run_job", lambda *_: [][1])
    code, messages = messages_of(assignment)
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
        (OSError(2, "No such file"), "worker_disk"),
        (OSError(12, "Cannot allocate memory"), "out_of_memory"),
        (OSError(22, "Invalid argument"), "internal"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
         "worker_disk"),
        (SafetensorError("I/O error: Cannot allocate memory (os error 12)"), "out_of_memory"),
        (SafetensorError("Error while deserializing header: invalid UTF-8"), "internal"),
    ],
)  # fmt: skip
def test_faults_of_the_device_are_told_apart(
    assignment: Assignment, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("workers.child.job_run.run_job", broken)
    status, messages = messages_of(assignment)
    told = messages[-1]["error"]
    assert isinstance(told, dict)
    assert (status, told["code"], bool(told["remedy"])) == (1, code, True)
    assert "\n" not in told["message"]


# Too small for a checkpoint (safetensors writes it), and for the outputs (which are ours).
@pytest.mark.parametrize("size", [128 * 1024, 1024 * 1024])
def test_a_disk_that_fills_up_at_any_moment_is_the_operators(tmp_path: Path, size: int) -> None:
    model = tiny_model(tmp_path / "model")
    with (
        small_disk(tmp_path / "disk", size) as disk,
        JobChild(tiny_assignment(tiny_spec(), model, disk)) as child,
    ):
        *_, last = child.messages()
    assert isinstance(last, Failed)
    assert last.error.code == "worker_disk"
    assert last.error.message.startswith("the disk is full: ")
    assert last.error.remedy == "free space in the worker's NIBBLE_STATE_DIR"
