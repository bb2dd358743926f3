"""The programs that newcomers run first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(300)
def test_one_command_leads_to_an_answer(repository: Path) -> None:
    command = [sys.executable, "examples/chat.py", "--num-samples", "2", "The history of"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    talked = subprocess.run(
        command, cwd=repository, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert talked.returncode == 0, talked.stdout + talked.stderr
    said = talked.stdout
    assert "/login?code=" in said
    _, _, answer = said.partition("you The history of\nwikitext ")
    assert answer.removesuffix("the service is stopped and its folder removed\n").strip(), said
