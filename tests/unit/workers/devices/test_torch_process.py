"""A process that leaves."""

from __future__ import annotations

import subprocess
import sys


def test_what_was_said_arrives_and_nothing_is_taken_down() -> None:
    code = (
        "import atexit; from workers.devices.torch_process import leave\n"
        "atexit.register(print, 'taken down'); print('said', end=''); leave(3)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("said", "", 3)
