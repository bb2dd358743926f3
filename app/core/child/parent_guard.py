"""Runs a program that starts processes of its own, and lets none of them outlive this process's parent.

    python -m app.core.child.start PARENT_PID app.core.child.parent_guard PROGRAM [ARGUMENT ...]

The kernel ends a direct child with its parent; a grandchild it leaves alone. This process leads the group of
them all: when its parent dies it kills the group. SIGTERM from a living parent is passed on to the program.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from app.core.child.start import die_with_parent


def main() -> int:
    parent, own = os.getppid(), os.getpid()
    program: subprocess.Popen[bytes] | None = None

    def on_term(number: int, frame: object) -> None:
        if os.getppid() != parent:
            os.killpg(0, signal.SIGKILL)
        if program is not None:
            program.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, on_term)
    die_with_parent(parent, signal.SIGTERM)
    # One thread and nothing loaded: code before the exec is safe here.
    program = subprocess.Popen(sys.argv[1:], preexec_fn=lambda: die_with_parent(own))
    code = program.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
