"""The inference server's whole process on a GPU: start, streams, many requests at once, stop.

In processes of their own: CUDA is initialised in this one, which hides what fails before.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from app.core.records.specs import Recipe
from tests.integration.inference_process import InferenceProcess, inference_server, start
from tests.tiny_models import EngineRun, tiny_spec

DEVICE = "cuda:0"
INHERITED = ("HOME", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "LIBRARY_PATH")
GREEDY = {"prompt": "The city of", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
AT_ONCE = 16


@pytest.fixture(scope="module")
def artifact(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, rounded to 4 bits."""
    spec = tiny_spec(Recipe(method="rtn", group_size=128, symmetric=True), formats=("compressed-tensors",))
    run = EngineRun(spec, example_model, tmp_path_factory.mktemp("run"), device=DEVICE)
    return run.folder("compressed-tensors")


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[InferenceProcess]:
    with inference_server(artifact, "--device", DEVICE, inherited=INHERITED) as running:
        yield running


def metrics(client: httpx.Client) -> dict[str, float]:
    """The server's own, by name; those of a label summed."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def streamed(client: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream that ends as it should."""
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_it_starts_and_reports_its_memory(server: InferenceProcess) -> None:
    """The peak is counted from before the first tensor on: that question must not be CUDA's first."""
    loading, ready = server.messages
    assert (loading["kind"], loading["device"], ready["kind"]) == ("loading", DEVICE, "ready")
    assert 0 < ready["packed_bytes"] <= ready["peak_bytes"]
    assert sum(ready["kernels"].values()) == 42  # linears: seven in each of six layers
    backend = "cuda" if torch.cuda.get_device_capability(0)[0] in (8, 9, 10, 12) else "triton"
    assert all(f": {backend}" in kernel for kernel in ready["kernels"])


def test_a_stream_says_what_an_answer_says(server: InferenceProcess) -> None:
    with server.client() as client:
        answer = client.post("/v1/completions", json=GREEDY).json()
        chunks = streamed(client, GREEDY)
    assert answer["usage"]["completion_tokens"] == GREEDY["max_tokens"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == answer["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert len(chunks) > 2


def test_requests_at_once_all_end_and_are_counted(server: InferenceProcess) -> None:
    """Lengths differ, so rows join and leave. Texts may differ: bfloat16 rounds by the batch's shape."""
    bodies = [GREEDY | {"prompt": "The city of " * (1 + n), "max_tokens": 16 + 4 * n} for n in range(AT_ONCE)]
    with server.client() as client:
        before = metrics(client)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(lambda body: client.post("/v1/completions", json=body).json(), bodies))
        after = metrics(client)
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [b["max_tokens"] for b in bodies]
    assert {answer["choices"][0]["finish_reason"] for answer in answers} == {"length"}
    counted = {name: after[name] - before[name] for name in after}
    assert counted["vllm:request_success_total"] == AT_ONCE
    assert counted["vllm:generation_tokens_total"] == sum(body["max_tokens"] for body in bodies)
    prompts = sum(answer["usage"]["prompt_tokens"] for answer in answers)
    assert counted["vllm:prompt_tokens_total"] == prompts
    assert 0 <= after["vllm:kv_cache_usage_perc"] <= 1


def test_sigterm_lets_a_stream_end_and_exits_with_0(artifact: Path) -> None:
    body = GREEDY | {"max_tokens": 400, "stream": True}
    with inference_server(artifact, "--device", DEVICE, inherited=INHERITED) as own, own.client() as client:
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            own.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert own.process.wait(30) == 0


def test_the_last_gpu_serves_as_the_first(artifact: Path) -> None:
    """Through Triton, whose kernels go to the thread's current GPU."""
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("one GPU here")
    options = ("--device", f"cuda:{count - 1}", "--kernel-backend", "triton")
    with inference_server(artifact, *options, inherited=INHERITED) as own, own.client() as client:
        answer = client.post("/v1/completions", json=GREEDY).json()
    assert answer["usage"]["completion_tokens"] == GREEDY["max_tokens"]


def test_a_gpu_that_is_not_there_is_named(artifact: Path) -> None:
    server = start(artifact, "--device", "cuda:99", inherited=INHERITED)
    assert server.process.wait(30) == 1
    failed = server.messages[-1]
    assert (failed["kind"], failed["code"]) == ("failed", "device_failed")
    assert failed["message"].startswith("cuda:99 can't be used: ")
