"""First code of a process of ours: tie its life to its parent's, then become what does the work.

    python -m app.core.child.start PARENT_PID [--confined] MODULE [ARGUMENT ...]
    python -m app.core.child.start PARENT_PID --program PROGRAM [ARGUMENT ...]

Without the tie, a supervisor that is killed leaves a child that computes for hours for nobody. It is made
before any heavy import, so that there is no window in which the child could be orphaned.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

from app.core.child.confinement import confine

PR_SET_PDEATHSIG = 1
ORPHANED = 143
CONFINED = "--confined"
PROGRAM = "--program"


def die_with_parent(parent_pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent dies; leave at once if it is dead already.

    Only Linux has such a call. Elsewhere an orphan lives on.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The parent may have died before the call: then this process has another parent by now.
    if os.getppid() != parent_pid:
        os._exit(ORPHANED)


def main() -> None:
    parent, words = int(sys.argv[1]), sys.argv[2:]
    if words[0] == PROGRAM:
        # With time to write its files: such a program, Redis say, keeps more than what we can compute again.
        die_with_parent(parent, signal.SIGTERM)
        os.execv(words[1], words[1:])  # noqa: S606  # not a shell's line: one program, its words apart
    die_with_parent(parent)
    if words[0] == CONFINED:
        del words[0]
        confine()
        die_with_parent(parent)  # a change of namespaces may have cleared it
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
