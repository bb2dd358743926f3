"""First code of a job child: tie its life to its parent's, then become the module that does the work.

    python -m app.core.child.start [--confined] PARENT_PID MODULE [ARGUMENT ...]

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


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies; leave at once if it is dead already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The parent may have died before the call: then this process has another parent by now.
    if os.getppid() != parent_pid:
        os._exit(ORPHANED)


def main() -> None:
    is_confined = sys.argv[1] == CONFINED
    parent, module, *arguments = sys.argv[2 if is_confined else 1 :]
    die_with_parent(int(parent))
    if is_confined:
        confine()
        die_with_parent(int(parent))  # a change of namespaces may have cleared it
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
