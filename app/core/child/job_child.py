"""Starts the process that does a job's work, reads its messages and explains its end.

Used by the worker's supervisor and by `nibble quantize`, where the terminal takes the supervisor's place.
The child gets its assignment on stdin and writes progress as JSON lines to a pipe.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator

from pydantic import ValidationError

from app.core.child.assignment import Assignment, ProgressMessage, progress_messages
from app.core.child.confinement import child_environment
from app.core.child.owned_process import OwnedProcess, exit_words
from app.core.child.start import CONFINED
from app.core.errors import ChildKilled, JobFault, OutOfMemory

CHILD_MODULE = "workers.child"
MAX_LINE_BYTES = 4 * 1024**2
POLL_S = 0.2


class JobChild(OwnedProcess):
    """A running job child."""

    def __init__(self, assignment: Assignment, *, module: str = CHILD_MODULE) -> None:
        self._progress, progress_end = os.pipe()
        try:
            super().__init__(
                [CONFINED, module, "--progress-fd", str(progress_end)],
                environment=child_environment(os.environ, assignment.work_folder),
                stdin=assignment.model_dump_json().encode(),
                fds=(progress_end,),
            )
        finally:
            os.close(progress_end)

    def messages(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[ProgressMessage]:
        """The child's messages, until it has ended; `on_wait` is called every POLL_S seconds without one.

        Raises JobFault for a line that is no message.
        """
        buffered = b""
        while True:
            ready, _, _ = select.select([self._progress], [], [], POLL_S)
            if not ready:
                if self.has_ended():  # a grandchild may still hold the pipe open
                    return
                on_wait()
                continue
            received = os.read(self._progress, 1 << 16)
            if not received:
                return
            *lines, buffered = (buffered + received).split(b"\n")
            if len(buffered) > MAX_LINE_BYTES:
                raise protocol_fault(f"a line of more than {MAX_LINE_BYTES} bytes")
            for line in lines:
                yield parse_message(line)

    def close(self) -> None:
        super().close()
        if self._progress >= 0:
            os.close(self._progress)
            self._progress = -1

    def wait_fault(self, grace_s: float) -> JobFault:
        """The reason why the child ended without a last message, after at most `grace_s` seconds."""
        code = self.wait(grace_s)
        self.close()
        if code is None:
            return protocol_fault("it closed its progress pipe and went on")
        return exit_fault(code, oom_killed=self.memory_ran_out())


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
    return JobFault(
        f"the job's process ended with {exit_words(return_code)} and no result",
        code="child_crashed",
        remedy="read the last lines of its output in the job's events, then retry",
    )
