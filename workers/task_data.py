"""Brings the data sets of lm-eval's tasks to this host: `python -m workers.task_data TASK...`.

A worker starts it before a job, whose own process has no network and reads the hub's cache. It runs lm-eval's
installed code, names come from lm-eval's index alone, and data sets come without code of their own.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from app.core.errors import TextRefused


def main(names: list[str]) -> int:
    """The exit code; what is wrong with a task is the last line of the output."""
    if find_spec("lm_eval") is None:
        return 0  # the job's process says so, and how to install it
    from workers.child.lm_eval_tasks import load_tasks

    try:
        load_tasks(names)
    except TextRefused as fault:
        sys.stderr.write(f"\n{fault.code}: {fault.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
