"""A child process that dies with this one: its last output is kept, and it gets SIGTERM before SIGKILL.

Job child, inference server, members of `nibble up`, Redis and calibration ranks are such processes. Start one
from a thread that outlives it: the kernel ties its life to the thread that started it.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

TAIL_LENGTH = 64 * 1024  # characters of output that are kept; a line that is longer is cut
READ_BYTES = 1 << 16
POLL_S = 0.02
READER_LIMIT_S = 2.0  # descendants outside of its group may hold the pipe open


class OwnedProcess:
    """A running process that leads a session of its own. As a context manager it leaves no process behind."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        fds: tuple[int, ...] = (),
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        """`words` are a module and its arguments, or another command line of `app.core.child.start`.

        It reads `stdin`, inherits `fds`, and `on_line` gets each line of its output, in another thread.
        """
        self._oom_kills = count_oom_kills()
        self._tail = ""
        self._on_line = on_line
        self._collecting = threading.Lock()
        self.is_closing = False  # set before the kill, which explains an end after it
        with input_file(stdin) as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app.core.child.start", str(os.getpid()), *words],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                env=environment,
                pass_fds=fds,
                # An interrupt at the terminal reaches this process alone, which ends the others in order.
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read_output, name=f"output {self.pid}", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """The code it ended with, negative for a signal; None while it runs."""
        return self._ended(os.WNOHANG)

    def has_ended(self) -> bool:
        return self.exit_code() is not None

    def wait(self, limit_s: float | None = None) -> int | None:
        """Its exit code, or None if it still runs after `limit_s` seconds."""
        if limit_s is None:
            return self._ended(0)
        deadline = time.monotonic() + limit_s
        while (code := self.exit_code()) is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return code

    def stop(self, grace_s: float) -> None:
        """SIGTERM, so that it ends by itself; after `grace_s` seconds SIGKILL, also for what it started."""
        self._signal(os.kill, signal.SIGTERM)
        self.wait(grace_s)
        self._signal(os.killpg, signal.SIGKILL)

    def close(self) -> None:
        """Kill what is left of it and of what it started, and collect it."""
        self.is_closing = True
        self._signal(os.killpg, signal.SIGKILL)
        self.wait()
        with self._collecting:
            self._process.wait()
        self._reader.join(READER_LIMIT_S)

    def output_tail(self) -> str:
        """The end of its stdout and stderr."""
        return self._tail

    def memory_ran_out(self) -> bool:
        """Whether the kernel killed it because memory ran out."""
        return self.exit_code() == -signal.SIGKILL and count_oom_kills() > self._oom_kills

    def _ended(self, options: int) -> int | None:
        # Not reaped here: until `close` its process id must stay valid for signals.
        if self._process.returncode is not None:
            return self._process.returncode
        if sys.platform == "darwin":  # without waitid before Python 3.13
            return self._process.poll() if options else self._process.wait()
        try:
            end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | options)
        except ChildProcessError:  # another thread collects it at this moment
            return self._process.wait()
        if end is None:
            return None
        return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status

    def _signal(self, send: Callable[[int, int], None], number: signal.Signals) -> None:
        with self._collecting:
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    send(self.pid, number)

    def _read_output(self) -> None:
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
        output = self._process.stdout
        assert output is not None
        rest = ""
        with output:
            while chunk := output.read(READ_BYTES):
                text = decoder.decode(chunk)
                self._tail = (self._tail + text)[-TAIL_LENGTH:]
                *lines, rest = (rest + text).split("\n")
                self._pass_on(lines)
                rest = rest[-TAIL_LENGTH:]
        self._pass_on([rest] if rest else [])

    def _pass_on(self, lines: Sequence[str]) -> None:
        if self._on_line is not None:
            for line in lines:
                self._on_line(line.rstrip())


def input_file(content: bytes) -> IO[bytes]:
    """A file that reads as `content`: a process that never reads its input can't block its parent."""
    if not content:
        return open(os.devnull, "rb")
    file = open(os.memfd_create("stdin"), "w+b")  # noqa: SIM115  # the caller closes it
    file.write(content)
    file.seek(0)
    return file


def exit_words(code: int) -> str:
    """An exit code, negative for a signal, for people."""
    if code >= 0:
        return f"exit code {code}"
    return f"signal {-code} ({signal.strsignal(-code) or 'unknown'})"


def count_oom_kills() -> int:
    """The number of out-of-memory kills in this process's control group, or else on this host."""
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
