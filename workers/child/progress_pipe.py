"""The child's side of its progress pipe: one JSON line for each message."""

from __future__ import annotations

import os
import threading

from app.core.child.assignment import ProgressMessage


class ProgressPipe:
    """Writes messages to a file descriptor, whole lines at a time, from any thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        # Processes that the child starts must not hold the pipe open after it has ended.
        os.set_inheritable(descriptor, False)

    def send(self, message: ProgressMessage) -> None:
        line = memoryview(message.model_dump_json().encode() + b"\n")
        with self._lock:
            while line:
                line = line[os.write(self._descriptor, line) :]
