"""`engine: vllm` with the real `vllm serve` on a CPU: gateway, worker, guard, server, model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.api_service import Service
from tests.integration.serving_floor import Floor
from tests.judges.cells import Cell, quantized
from tests.waiting import wait_until

START_S = 1200  # seconds of processor time are tens, but all cores may be busy
OPTIONS = {
    "max_model_len": 256,
    "max_num_seqs": 4,
    "dtype": "bfloat16",
    "enforce_eager": True,
    "tool_call_parser": "hermes",
}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"page": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["page"],
            "additionalProperties": False,
        },
    },
}
QUESTION: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Who wrote the novel ?"}],
    "max_tokens": 8,
    "temperature": 0,
}


@pytest.fixture
def floor(service: Service) -> Floor:
    service.client.timeout = 300  # the first request of a server compiles and warms up
    return Floor(service)


@pytest.fixture
def worker(floor: Floor, vllm_environment: Path) -> Iterator[None]:
    """A worker that has the real vLLM on its PATH."""
    path = f"{vllm_environment / 'bin'}:{os.environ['PATH']}"
    # GiB of memory, which vLLM fills at once
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with floor.worker(real=True, PATH=path, **variables) as process:
        yield
        process.kill()
        process.wait()
        wait_until(lambda: not floor.servers())  # none outlives the worker


def deployed(floor: Floor, name: str, folder: Path) -> str:
    """Id of a new deployment of the folder."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    artifact = floor.service.publish(floor.service.submit(force=True)["id"], files)
    return floor.deploy(name, artifact.id, engine="vllm", vllm=OPTIONS)


def await_ready(floor: Floor, deployment_id: str) -> dict[str, Any]:
    """The server's view once it answers."""

    def is_ready() -> bool:
        servers = floor.view(deployment_id)["servers"]
        return bool(servers) and servers[0]["state"] == "ready"

    wait_until(is_ready, START_S, failure=lambda: floor.view(deployment_id)["error"])
    server: dict[str, Any] = floor.view(deployment_id)["servers"][0]
    return server


def said(floor: Floor, name: str) -> str:
    answer = floor.chat(name, **QUESTION)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def streamed(floor: Floor, name: str) -> str:
    with floor.stream(name, **QUESTION) as lines:
        *events, last = (line.removeprefix("data: ") for line in lines)
    assert last == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert len(deltas) > 2
    return "".join(delta.get("content") or "" for delta in deltas)


def call_of(floor: Floor, name: str) -> dict[str, Any]:
    """The call that the server must write. A model of this size fills in any arguments."""
    choice = {"type": "function", "function": {"name": "look_up"}}
    fields = QUESTION | {"max_tokens": 120, "tools": [TOOL], "tool_choice": choice}
    answer = floor.chat(name, **fields)
    assert answer.status_code == 200, answer.text
    message = answer.json()["choices"][0]["message"]
    assert "tool_calls" in message, answer.text
    (call,) = message["tool_calls"]
    function: dict[str, Any] = call["function"]
    return function


def kill_engine(floor: Floor, deployment_id: str) -> None:
    """End the process in which vLLM computes: it changes its name, but not its group."""
    groups = {os.getpgid(pid) for pid in floor.server_pids(deployment_id)}
    engines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            pid = int(path.parent.name)
            if b"EngineCore" in path.read_bytes() and os.getpgid(pid) in groups:
                engines.append(pid)
    (engine,) = engines
    os.kill(engine, signal.SIGKILL)


@pytest.mark.usefixtures("worker")
def test_two_deployments_by_the_real_vllm(floor: Floor, tmp_path: Path) -> None:
    cells = [Cell("compressed-tensors", 4, False), Cell("gptq", 4, True)]
    files = quantized(cells, tmp_path / "cells")
    first, second = (deployed(floor, cell.format, files[cell].folder) for cell in cells)
    for deployment_id in (first, second):
        server = await_ready(floor, deployment_id)
        assert (server["engine"], server["restarts"]) == ("vllm", 0)
    models = {model["id"]: model["max_model_len"] for model in floor.client.get("/v1/models").json()["data"]}
    assert models == {"compressed-tensors": 256, "gptq": 256}

    for name in models:
        assert said(floor, name) == streamed(floor, name) != ""
        assert call_of(floor, name)["name"] == "look_up"
        # A model of this size calls nothing by itself; that the request is taken shows that the parser is on.
        assert floor.chat(name, **QUESTION, tools=[TOOL]).status_code == 200
    # A route that this service does not know: the answer is vLLM's, which names an option of its own.
    rendered = floor.client.post("/v1/chat/completions/render", json={"model": "gptq", **QUESTION})
    assert "--enable-scale-out" in rendered.text
    metrics = floor.client.get(f"/v1/deployments/{first}/servers/0/metrics").text
    assert "vllm:generation_tokens_total{" in metrics
    counted = f'nibble_inference_requests_total{{deployment="{first}",status="200"}} 4.0'
    assert counted in floor.client.get("/metrics").text

    before = said(floor, "compressed-tensors")
    kill_engine(floor, first)
    wait_until(lambda: floor.view(first)["servers"][0]["state"] != "ready", 120)
    assert said(floor, "gptq") != ""  # the other goes on
    assert await_ready(floor, first)["restarts"] == 1
    assert said(floor, "compressed-tensors") == before

    for deployment_id in (first, second):
        assert floor.client.delete(f"/v1/deployments/{deployment_id}").status_code == 202
        wait_until(lambda gone=deployment_id: not floor.server_pids(gone), 120)
