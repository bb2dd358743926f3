"""The inference server when callers go, when there are too many of them, and when it has to end."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.integration.inference_process import InferenceProcess, inference_server
from tests.waiting import wait_until
from workers.serving.__main__ import main

LONG = {"prompt": "The city", "max_tokens": 240, "temperature": 0, "ignore_eos": True}


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


@pytest.fixture(scope="module")
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


def test_sigterm_drains(narrow: InferenceProcess) -> None:
    """What runs ends well, what comes is refused, and then the process ends with 0."""
    with narrow.client() as client:
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            narrow.process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get("/health").status_code == 503)
            refused = client.post("/v1/completions", json=LONG)
            rest = list(lines)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert rest[-2:] == ["data: [DONE]", ""]
        assert json.loads(rest[-4].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert narrow.process.wait(20) == 0


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


def test_an_artifact_that_can_t_be_served_is_reported(
    small_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_method(config: dict[str, Any]) -> None:
        config["quantization_config"]["quant_method"] = "bitsandbytes"

    folder = damaged(tmp_path / "artifact", small_artifact, other_method)
    reading, writing = os.pipe()
    options = ["--artifact", str(folder), "--name", "x", "--ready-fd", str(writing)]
    monkeypatch.setattr("sys.argv", ["workers.serving", *options])
    assert main() == 1
    os.close(writing)
    with os.fdopen(reading) as pipe:
        message = [json.loads(line) for line in pipe][-1]
    assert message["kind"] == "failed"
    assert message["code"] == "artifact_unsupported"
    assert "bitsandbytes" in message["message"]
    assert message["remedy"]


WARNING = """
import functools, warnings
from transformers.models.llama.modeling_llama import LlamaForCausalLM as Model

forward = Model.forward

@functools.wraps(forward)
def warning(*arguments, **named):
    warnings.warn("an argument got a new name", FutureWarning)
    return forward(*arguments, **named)

Model.forward = warning
"""


def test_a_warning_of_the_model_s_class_does_not_end_the_engine(
    small_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the operator has warnings raised as errors."""
    (tmp_path / "sitecustomize.py").write_text(WARNING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONWARNINGS", "error:an argument got a new name:FutureWarning")
    inherited = ("PYTHONPATH", "PYTHONWARNINGS")
    options = ("--kernel-backend", "torch")  # its layers run in the class's own forward
    with inference_server(small_artifact, *options, inherited=inherited) as server, server.client() as client:
        answer = client.post("/v1/completions", json=LONG)
    assert answer.json()["usage"]["completion_tokens"] == LONG["max_tokens"]
