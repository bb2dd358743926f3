"""A running `nibble up`, for the tests of the installed service."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.waiting import wait_until

START_LIMIT_S = 200.0
STOP_LIMIT_S = 40.0


class Service:
    """A running `nibble up` and its environment."""

    def __init__(self, state: Path, model_roots: Sequence[Path], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.environment = {
            **os.environ,
            "NIBBLE_STATE_DIR": str(state),
            "NIBBLE_PORT": str(port),
            "NIBBLE_MODEL_ROOTS": ":".join(map(str, model_roots)),
        }
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "up"], env=self.environment, stdout=out, stderr=out
            )

    def await_ready(self) -> None:
        wait_until(
            lambda: "ready at" in self.log.read_text(),
            START_LIMIT_S,
            failure=lambda: self.process.poll() is not None and self.log.read_text(),
        )

    def members(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def nibble(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "app.cli", *arguments],
            env=self.environment, capture_output=True, text=True, check=False, timeout=240,
        )  # fmt: skip


@contextmanager
def running_service(folder: Path, *model_roots: Path) -> Iterator[Service]:
    """A service that is ready; stopped afterwards."""
    running = Service(folder / "state", model_roots, folder / "up.log")
    try:
        running.await_ready()
        yield running
    finally:
        running.process.terminate()
        try:
            running.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            running.process.kill()
            running.process.wait()
