"""The process that does a job's work: started, listened to, stopped, and its end explained.

Used by the worker's supervisor and by `nibble quantize`, where the terminal takes the supervisor's place.
The child gets its assignment on stdin and writes progress as JSON lines to a pipe. Start it from the main
thread: the kernel ties a child's life to the thread that started it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from app.core.child.assignment import Assignment, ProgressMessage, progress_messages
from app.core.child.start import CONFINED
from app.core.errors import ChildKilled, JobFault, OutOfMemory

CHILD_MODULE = "workers.child"
TAIL_BYTES = 64 * 1024
MAX_LINE_BYTES = 4 * 1024**2
POLL_S = 0.2
PASSED_ON = frozenset({"PATH", "HOME", "LANG", "LD_LIBRARY_PATH"})
PASSED_PREFIXES = ("CUDA_", "NVIDIA_", "OMP_", "GOMP_", "KMP_", "MKL_", "PYTHON")


def child_environment(environment: Mapping[str, str], work_folder: Path) -> dict[str, str]:
    """What the child may see of the environment: no keys, no addresses.

    Its threads sleep while they wait for each other, unless the environment says otherwise.
    """
    passed = {
        name: value
        for name, value in environment.items()
        if name in PASSED_ON or name.startswith(PASSED_PREFIXES)
    }
    return {"OMP_WAIT_POLICY": "passive", **passed, "TMPDIR": str(work_folder), "HF_HUB_OFFLINE": "1"}


class JobChild:
    """A running job child. As a context manager it leaves no process behind."""

    def __init__(self, assignment: Assignment, *, module: str = CHILD_MODULE) -> None:
        self._oom_kills = count_oom_kills()
        self._tail = bytearray()
        self._tail_lock = threading.Lock()
        self._progress, progress_end = os.pipe()
        output, output_end = os.pipe()
        command = [sys.executable, "-m", "app.core.child.start", CONFINED, str(os.getpid()), module]
        # A file instead of a pipe: a child that never reads its assignment can't block its supervisor.
        with tempfile.TemporaryFile(dir=assignment.work_folder) as stdin:
            stdin.write(assignment.model_dump_json().encode())
            stdin.seek(0)
            self._process = subprocess.Popen(
                [*command, "--progress-fd", str(progress_end)],
                stdin=stdin,
                stdout=output_end,
                stderr=output_end,
                pass_fds=(progress_end,),
                start_new_session=True,
                env=child_environment(os.environ, assignment.work_folder),
            )
        os.close(progress_end)
        os.close(output_end)
        self._reader = threading.Thread(
            target=self._keep_tail, args=(output,), name="child output", daemon=True
        )
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> JobChild:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def messages(self) -> Iterator[ProgressMessage]:
        """What the child says, until it has ended.

        Raises JobFault for a line that is no message.
        """
        buffered = b""
        while True:
            ready, _, _ = select.select([self._progress], [], [], POLL_S)
            if not ready:
                if self.has_ended():  # a grandchild may still hold the pipe open
                    return
                continue
            received = os.read(self._progress, 1 << 16)
            if not received:
                return
            *lines, buffered = (buffered + received).split(b"\n")
            if len(buffered) > MAX_LINE_BYTES:
                raise protocol_fault(f"a line of more than {MAX_LINE_BYTES} bytes")
            for line in lines:
                yield parse_message(line)

    def has_ended(self) -> bool:
        """True once the process is gone. It isn't reaped here: its id must stay ours until `close`."""
        if self._process.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # another thread collects it at this moment
            return True

    def terminate(self, grace_s: float) -> None:
        """Ask the child to stop; kill its process group if it hasn't after `grace_s`."""
        self._signal_group(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and not self.has_ended():
            time.sleep(0.02)
        self._signal_group(signal.SIGKILL)

    def close(self) -> None:
        """Kill what is left of the child and collect it."""
        self._signal_group(signal.SIGKILL)
        self._process.wait()
        self._reader.join(timeout=2)
        if self._progress >= 0:
            os.close(self._progress)
            self._progress = -1

    def wait_fault(self, grace_s: float) -> JobFault:
        """Why the child ended without a last message. A child that closed its pipe gets `grace_s` to end."""
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and not self.has_ended():
            time.sleep(0.02)
        hung = not self.has_ended()
        self._signal_group(signal.SIGKILL)
        code = self._process.wait()
        self._reader.join(timeout=2)
        if hung:
            return protocol_fault("it closed its progress pipe and went on")
        return exit_fault(code, oom_killed=count_oom_kills() > self._oom_kills)

    def output_tail(self) -> str:
        """The last 64 KiB of the child's stdout and stderr."""
        with self._tail_lock:
            return self._tail.decode(errors="replace")

    def _signal_group(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _keep_tail(self, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb", buffering=0) as output:
            while piece := output.read(1 << 16):
                with self._tail_lock:
                    self._tail += piece
                    del self._tail[:-TAIL_BYTES]


def parse_message(line: bytes) -> ProgressMessage:
    try:
        return progress_messages.validate_json(line)
    except ValidationError as fault:
        raise protocol_fault(f"{line[:200]!r} is not a progress message") from fault


def protocol_fault(what: str) -> JobFault:
    return JobFault(
        f"the job's process broke its protocol: {what}",
        code="child_protocol",
        remedy="report this with the job's events; a retry makes a new attempt",
    )


def exit_fault(return_code: int, *, oom_killed: bool) -> JobFault:
    """The fault behind an exit without a last message. `return_code` is negative for a signal."""
    if return_code == -signal.SIGKILL and oom_killed:
        return OutOfMemory(
            "the kernel killed the job's process because memory ran out",
            remedy="give the worker more memory, or lower calibration.num_samples or sequence_length",
        )
    if return_code == -signal.SIGKILL:
        return ChildKilled(
            "the job's process was killed from outside (signal 9); no memory had run out",
            remedy="find out who sends signal 9 on the worker's host (an operator, a limit of the container)",
        )
    cause = f"exit code {return_code}"
    if return_code < 0:
        cause = f"signal {-return_code} ({signal.strsignal(-return_code) or 'unknown'})"
    return JobFault(
        f"the job's process ended with {cause} and no result",
        code="child_crashed",
        remedy="read the last lines of its output in the job's events, then retry",
    )


def count_oom_kills() -> int:
    """How often the kernel has killed for memory in this process's control group, or else on this host."""
    for path in (own_memory_events(), Path("/proc/vmstat")):
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
    return 0


def own_memory_events() -> Path:
    """`memory.events` of this process's control group (version 2)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                return Path("/sys/fs/cgroup", line[4:], "memory.events")
    return Path("/sys/fs/cgroup/memory.events")
