"""The process that brings data sets of lm-eval's tasks to this host: that of a job has no network."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from app.core.child.confinement import OFFLINE, child_environment
from app.core.child.owned_process import OwnedProcess, exit_words
from app.core.errors import TextRefused
from app.core.records.specs import BUNDLED_TASKS

TASK_DATA_MODULE = "workers.task_data"
TASK_FAULTS = ("task_unknown", "task_generates", "task_unavailable")
HUB_VARIABLES = ("HF_TOKEN", "HF_ENDPOINT")
POLL_S = 0.2


def fetch_task_data(
    names: Sequence[str], folder: Path, on_bytes: Callable[[int], None], *, module: str = TASK_DATA_MODULE
) -> None:
    """Have a process bring the data sets of lm-eval's tasks into the hub's cache of this host.

    It has the network, which the job's process has not, and no keys but the hub's; `folder` takes its
    temporary files. `on_bytes` gets a 0 now and then and may raise.
    Raises TextRefused with its reason.
    """
    remote = [name for name in names if name not in BUNDLED_TASKS]
    if not remote:
        return
    environment = child_environment(os.environ, folder)
    del environment[OFFLINE]
    environment |= {name: os.environ[name] for name in HUB_VARIABLES if name in os.environ}
    with OwnedProcess([module, *remote], environment=environment) as process:
        while (code := process.wait(POLL_S)) is None:
            on_bytes(0)
        process.close()
        if code != 0:
            lines = process.output_tail().strip().splitlines()
            reason, _, message = (lines or [exit_words(code)])[-1].partition(": ")
            raise TextRefused(
                message or reason, code=reason if message and reason in TASK_FAULTS else "task_unavailable",
                remedy="name other tasks, or let this host reach the hub (huggingface.co)",
                param="evaluation.tasks",
            )  # fmt: skip
