"""Engine vllm against a stand-in executable that speaks vLLM's command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from app.core.records.serving_options import ServerOptions, VllmOptions
from tests.integration.api_service import Service
from tests.integration.serving_floor import Floor
from tests.integration.workshop import REPOSITORY
from tests.waiting import wait_until
from workers.replicas.served_files import ServedFiles
from workers.replicas.server_process import Launch, vllm_environment


@pytest.fixture
def floor(service: Service) -> Floor:
    return Floor(service)


@pytest.fixture
def path_with_vllm(tmp_path: Path) -> str:
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "vllm"
    program.write_text(
        f'#!/bin/sh\nexec {sys.executable} {REPOSITORY}/tests/integration/stand_in_server.py "$@"\n'
    )
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_vllm_is_started_with_its_own_words(floor: Floor, path_with_vllm: str) -> None:
    options = {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "distributed_executor_backend": "ray",
        "gpu_memory_utilization": 0.5,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "tool_call_parser": "hermes",
    }
    variables = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_API_KEY": "of another server"}
    with floor.worker("one", PATH=path_with_vllm, **variables) as worker:
        wait_until(lambda: "with transformers, vllm" in floor.log_of())
        deployment_id = floor.ready("tiny", engine="vllm", vllm=options)
        assert floor.view(deployment_id)["servers"][0]["engine"] == "vllm"
        assert floor.chat("tiny").json()["choices"][0]["message"]["content"] == "t0 t1 t2 "
        log = floor.log_of()
        for words in (
            "'serve', '", "'--served-model-name', 'tiny', '--host', '127.0.0.1', '--port', '",
            "'--tensor-parallel-size', '2', '--pipeline-parallel-size', '2'",
            "'--distributed-executor-backend', 'ray'", "'--gpu-memory-utilization', '0.5'",
            "'--enforce-eager'", "'--no-enable-prefix-caching'",
            "'--enable-auto-tool-choice'", "'--tool-call-parser', 'hermes'",
            "vllm ['VLLM_LOGGING_LEVEL', 'VLLM_RPC_BASE_PATH']",
        ):  # fmt: skip
            assert words in log
        # The guard, the server, and a process that the server has started: none outlives the worker.
        assert len(floor.server_pids(deployment_id)) >= 3
        worker.kill()
        worker.wait()
        wait_until(lambda: not floor.servers(), 20)


def test_on_a_gpu_auto_means_vllm(floor: Floor, path_with_vllm: str) -> None:
    with floor.worker("one", "cuda:3", PATH=path_with_vllm):
        deployment_id = floor.ready("tiny")
        assert floor.view(deployment_id)["servers"][0]["engine"] == "vllm"
        assert "devices 3" in floor.log_of()
        assert floor.client.delete(f"/v1/deployments/{deployment_id}").status_code == 202
        wait_until(lambda: not floor.server_pids(deployment_id))


def test_a_worker_without_vllm_refuses_it_by_name(floor: Floor) -> None:
    with floor.worker():
        wait_until(lambda: floor.client.get("/v1/workers").json()["data"])
        body = {"artifact": floor.artifact(), "name": "tiny", "engine": "vllm"}
        refused = floor.client.post("/v1/deployments", json=body)
        assert (refused.status_code, refused.json()["code"]) == (422, "vllm_not_installed")
        job = {"model": "x", "deploy": {"name": "tiny", "engine": "vllm"}}
        refused = floor.client.post("/v1/jobs", json=job)
        assert (refused.status_code, refused.json()["code"]) == (422, "vllm_not_installed")


@pytest.mark.parametrize(
    ("device", "share", "set_by_host", "cache_gib"),
    [
        ("cpu", None, None, "4"),
        ("cpu", None, "9", "9"),
        ("cpu", 0.3, None, None),
        ("cuda:0", None, None, None),
    ],
)
def test_on_a_cpu_several_servers_of_vllm_share_the_memory(
    device: str, share: float | None, set_by_host: str | None, cache_gib: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    if set_by_host is not None:
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", set_by_host)
    options = ServerOptions(engine="vllm", vllm=VllmOptions(gpu_memory_utilization=share))
    launch = Launch(ServedFiles(tmp_path), tmp_path, "tiny", "127.0.0.1", device, "auto", 1.0, options)
    assert vllm_environment(launch).get("VLLM_CPU_KVCACHE_SPACE") == cache_gib
