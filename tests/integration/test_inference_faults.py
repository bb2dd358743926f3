"""The inference server when callers go, when there are too many of them, and when it has to end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.integration.inference_process import (
    REPOSITORY,
    InferenceProcess,
    environment,
    inference_server,
    start,
)

LONG = {"prompt": "The city", "max_tokens": 240, "temperature": 0, "ignore_eos": True}


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gauge(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"vllm:{name}{{")).rsplit(" ", 1)[1])


def aborted(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("vllm:request_success_total") and '"abort"' in line]
    return float(found[0].rsplit(" ", 1)[1]) if found else 0


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_caller_that_goes_ends_its_work(inference: InferenceProcess, stream: bool) -> None:
    body = json.dumps(LONG | {"stream": stream, "n": 8}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    port = inference.messages[-1]["port"]
    with inference.client() as client:
        before = aborted(client)
        generated = gauge(client, "generation_tokens_total")
        with socket.create_connection(("127.0.0.1", port)) as caller:
            caller.sendall(head.encode() + body)
            wait_until(lambda: gauge(client, "generation_tokens_total") > generated)
        wait_until(lambda: aborted(client) == before + 8, 10)
        wait_until(lambda: gauge(client, "num_requests_running") == 0, 10)


@pytest.fixture
def narrow(small_artifact: Path) -> Iterator[InferenceProcess]:
    """Two rows and two places to wait."""
    with inference_server(small_artifact, "--max-sequences", "2", "--max-waiting", "2") as server:
        yield server


def test_a_flood_is_refused_and_leaves_nothing_behind(narrow: InferenceProcess) -> None:
    process = psutil.Process(narrow.process.pid)

    def post(_: int) -> tuple[int, str | None]:
        answer = client.post("/v1/completions", json=LONG)
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == "overloaded"
        return answer.status_code, answer.headers.get("retry-after")

    with narrow.client() as client, ThreadPoolExecutor(24) as pool:
        list(pool.map(post, range(24)))
        before = process.memory_info().rss
        answers = list(pool.map(post, range(200)))
        after = process.memory_info().rss
        assert {status for status, _ in answers} == {200, 429}
        assert all(int(wait or 0) > 0 for status, wait in answers if status == 429)
        assert after - before < 16 * 1024**2
        assert client.post("/v1/completions", json=LONG).status_code == 200


def test_sigterm_drains(small_artifact: Path) -> None:
    """What runs ends well, what comes is refused, and then the process ends with 0."""
    with inference_server(small_artifact) as server, server.client() as client:
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get("/health").status_code == 503)
            refused = client.post("/v1/completions", json=LONG)
            rest = list(lines)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert rest[-2:] == ["data: [DONE]", ""]
        assert json.loads(rest[-4].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(20) == 0


def test_a_drain_that_takes_too_long_ends_streams_with_an_error(small_artifact: Path) -> None:
    with inference_server(small_artifact, "--drain-s", "0") as server, server.client() as client:
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            frames = [line.removeprefix("data: ") for line in lines if line]
        assert frames[-1] == "[DONE]"
        assert json.loads(frames[-2])["error"]["message"].startswith("the server is shutting down")
        assert server.process.wait(20) == 0


def test_it_dies_with_its_parent(small_artifact: Path) -> None:
    """The parent is killed without warning."""
    program = (
        "import sys, time; from pathlib import Path; from tests.integration.inference_process import start\n"
        "server = start(Path(sys.argv[1])); print(server.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(small_artifact)],
        cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert psutil.pid_exists(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not alive(child))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def damaged(folder: Path, artifact: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose config.json was changed."""
    folder.mkdir()
    for file in artifact.iterdir():
        os.symlink(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_artifact_that_can_t_be_served_is_reported(small_artifact: Path, tmp_path: Path) -> None:
    def other_method(config: dict[str, Any]) -> None:
        config["quantization_config"]["quant_method"] = "bitsandbytes"

    server = start(damaged(tmp_path / "artifact", small_artifact, other_method))
    assert server.process.wait(30) == 1
    assert server.messages[-1]["kind"] == "failed"
    assert server.messages[-1]["code"] == "artifact_unsupported"
    assert "bitsandbytes" in server.messages[-1]["message"]
    assert server.messages[-1]["remedy"]
