"""A real inference server process on a small artifact."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

REPOSITORY = Path(__file__).parents[2]
NAME = "tiny-w4"


@dataclass
class InferenceProcess:
    """A server that reported that it is ready."""

    process: subprocess.Popen[bytes]
    messages: list[dict[str, Any]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.messages[-1]['port']}"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def start(artifact: Path, *options: str, inherited: tuple[str, ...] = ()) -> InferenceProcess:
    """Start a server and read its messages until it is ready or failed."""
    reading, writing = os.pipe()
    command = [
        sys.executable, "-m", "app.core.child.start", str(os.getpid()), "workers.serving",
        "--artifact", str(artifact), "--name", NAME, "--ready-fd", str(writing), "--threads", "1", *options,
    ]  # fmt: skip
    variables = environment() | {name: os.environ[name] for name in inherited if name in os.environ}
    process = subprocess.Popen(command, pass_fds=(writing,), cwd=REPOSITORY, env=variables)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        messages = []
        for line in pipe:
            messages.append(json.loads(line))
            if messages[-1]["kind"] != "loading":
                break
    return InferenceProcess(process, messages)


def environment() -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@contextmanager
def inference_server(
    artifact: Path, *options: str, inherited: tuple[str, ...] = ()
) -> Iterator[InferenceProcess]:
    server = start(artifact, *options, inherited=inherited)
    try:
        assert server.messages[-1]["kind"] == "ready", server.messages
        yield server
    finally:
        server.process.kill()
        server.process.wait()
