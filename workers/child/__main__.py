"""The job child: reads an assignment from stdin, runs the engine, reports over a pipe.

It holds no secret and no connection. Its last message is `finished` or `failed`; if neither arrives, it
was killed, and its supervisor says by whom.
"""

from __future__ import annotations

import gc

from workers.devices.torch_process import leave, return_freed_memory, use_huge_pages

if __name__ == "__main__":
    # Imported modules stay: collecting garbage among them takes a fifth of the start.
    gc.disable()
    use_huge_pages()

import argparse
import errno
import os
import re
import sys
import traceback

import torch

from app.core.child.assignment import REPORT, Assignment, Failed, Finished, Noted
from app.core.child.confinement import NETWORK
from app.core.errors import DeviceFault, JobFault, NibbleError, OutOfMemory
from app.core.faults.system_faults import STATE_FOLDER, system_fault, system_number
from app.core.records.job import Problem
from app.core.telemetry.logs import log_warnings
from kernels.backend import Backend, backends_of
from kernels.cpu.float_products import use_whole_vectors
from kernels.cuda.driver import DriverError
from workers.child.progress_pipe import ProgressPipe

DEVICE_ERROR = re.compile(r"\b(CUDA|CUDA driver|NCCL) error\b|\bCU(BLAS|DNN|SOLVER)_STATUS_|\bcudaError")
MEMORY_ERROR = re.compile(r"out of memory|_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation", re.IGNORECASE)


def run(assignment: Assignment, pipe: ProgressPipe) -> int:
    """The exit code: 0 after `finished`, 1 after `failed`."""
    try:
        if assignment.threads is not None:
            torch.set_num_threads(assignment.threads)
        if os.environ.get(NETWORK) == "on":
            pipe.send(Noted(code="network_on", message="this host lets no process leave its network"))
        names = [backend.name for backend in chosen_backends(assignment)]
        order = f"kernels are chosen in this order, by what the host can run: {', '.join(names)}"
        pipe.send(Noted(code="kernel_backend", message=order))
        pipe.send(run_of(assignment, pipe))
    except NibbleError as error:
        pipe.send(Failed(error=Problem.of(error), report=written_report(assignment)))
    except Exception as error:  # noqa: BLE001  # the task boundary: whatever happened must reach the job record
        traceback.print_exc()
        pipe.send(Failed(error=Problem.of(fault_of(assignment, error))))
    else:
        return 0
    return 1


def run_of(assignment: Assignment, pipe: ProgressPipe) -> Finished:
    """The job, by what it needs: without an evaluation no model is built, so transformers is not loaded."""
    if assignment.spec.evaluation is None:
        from workers.child.streaming import run_model_free

        return run_model_free(assignment, pipe.send)
    from workers.child.job_run import run_job

    return run_job(assignment, pipe.send)


def written_report(assignment: Assignment) -> str | None:
    """The report on what was tried, if the run came that far."""
    path = assignment.work_folder / REPORT
    return REPORT if path.exists() else None


def chosen_backends(assignment: Assignment) -> tuple[Backend, ...]:
    """The backends that the operator allows. Raises JobFault if there is none of that name."""
    try:
        return backends_of(torch.device(assignment.device).type, assignment.kernel_backend)
    except ValueError as fault:
        raise JobFault(
            str(fault), code="kernel_backend_absent", remedy="set NIBBLE_KERNEL_BACKEND to auto on the worker"
        ) from fault


def fault_of(assignment: Assignment, error: Exception) -> JobFault:
    """The fault that ended the run: of the host's memory or files, of the device, or our own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or system_number(error) == errno.ENOMEM:
        return out_of_memory(assignment, error)
    return system_fault(error, STATE_FOLDER) or device_fault(assignment, error) or own_fault(error)


def own_fault(error: Exception) -> JobFault:
    return JobFault(
        f"{type(error).__name__}: {error}", code="internal",
        remedy="this is a fault of Nibble: please report it with the job's events",
    )  # fmt: skip


def device_fault(assignment: Assignment, error: Exception) -> JobFault | None:
    """The fault behind an error of the device; None if the error is of another kind.

    The driver names them, PyTorch passes the name on in its message, also for its own libraries.
    """
    text = str(error)
    if not isinstance(error, torch.AcceleratorError | DriverError) and not DEVICE_ERROR.search(text):
        return None
    if MEMORY_ERROR.search(text):
        return out_of_memory(assignment, error)
    return DeviceFault(
        f"{assignment.device} failed: {text.partition(chr(10))[0]}",
        remedy="look for Xid lines in the kernel log of the worker's host; the next attempt starts afresh",
    )


def out_of_memory(assignment: Assignment, error: BaseException) -> OutOfMemory:
    return OutOfMemory(
        f"{assignment.device} ran out of memory: {error}",
        remedy="use fewer or shorter calibration samples, or a device with more memory",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--progress-fd", type=int, required=True)
    pipe = ProgressPipe(parser.parse_args().progress_fd)
    gc.freeze()
    gc.enable()
    return_freed_memory()
    log_warnings()
    assignment = Assignment.model_validate_json(sys.stdin.read())
    use_whole_vectors(torch.device(assignment.device))
    return run(assignment, pipe)


if __name__ == "__main__":
    leave(main())
