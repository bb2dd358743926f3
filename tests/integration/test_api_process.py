"""The API as a process of its own: what it loads, what it weighs, how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.integration.api_service import EXAMPLES, MODEL
from tests.integration.hub_server import HubServer, hub_server

MAX_RESIDENT_BYTES = 150 * 1000**2


class Process:
    def __init__(self, process: subprocess.Popen[bytes], url: str, state_dir: Path) -> None:
        self.process = process
        self.state_dir = state_dir
        self.client = httpx.Client(base_url=url, timeout=30, trust_env=False)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                assert self.client.get("/readyz").status_code == 200
            except httpx.TransportError:
                assert self.process.poll() is None, "the API ended"
                assert time.monotonic() < deadline, "the API did not start"
                time.sleep(0.05)
            else:
                break
        key = (self.state_dir / "api-key").read_text().strip()
        self.client.headers["Authorization"] = f"Bearer {key}"

    @property
    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    @property
    def mapped_files(self) -> str:
        return Path(f"/proc/{self.process.pid}/maps").read_text()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


@pytest.fixture
def api(tmp_path: Path, repository: Path, hub: HubServer) -> Iterator[Process]:
    """`nibble api` with its embedded Redis, a folder as storage, and a hub of our own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "NIBBLE_STATE_DIR": str(tmp_path / "state"),
        "NIBBLE_PORT": str(port),
        "NIBBLE_MODEL_ROOTS": str(EXAMPLES),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
    }
    command = [sys.executable, "-m", "app.cli", "api"]
    with subprocess.Popen(command, cwd=repository, env=environment) as process:
        api = Process(process, f"http://127.0.0.1:{port}", tmp_path / "state")
        with api.client:
            api.wait_until_ready()
            yield api
        process.kill()


def test_the_api_stays_small_under_load(api: Process) -> None:
    for _ in range(50):
        assert api.client.post("/v1/jobs", json={"model": MODEL}).status_code == 202
        assert api.client.get("/v1/jobs", params={"limit": 100}).status_code == 200
    assert api.client.get("/metrics").status_code == 200
    assert api.resident_bytes < MAX_RESIDENT_BYTES
    assert "torch" not in api.mapped_files
    assert "numpy" not in api.mapped_files


def test_the_api_ends_in_order_and_keeps_its_jobs(api: Process) -> None:
    job_id = api.client.post("/v1/jobs", json={"model": MODEL}).json()["id"]
    api.process.send_signal(signal.SIGTERM)
    assert api.process.wait(30) in (0, -signal.SIGTERM)
    assert (api.state_dir / "redis" / "appendonlydir").is_dir()
    appended = b"".join(path.read_bytes() for path in (api.state_dir / "redis" / "appendonlydir").iterdir())
    assert job_id.encode() in appended


def test_waiting_requests_are_answered_when_the_api_ends(api: Process) -> None:
    job_id = api.client.post("/v1/jobs", json={"model": MODEL}).json()["id"]
    waiting = {"poll": {"Prefer": "wait=60"}, "stream": {"Accept": "text/event-stream"}}
    routes = {"poll": f"/v1/jobs/{job_id}", "stream": f"/v1/jobs/{job_id}/events"}
    with ThreadPoolExecutor(2) as pool:
        answers = {
            name: pool.submit(api.client.get, routes[name], headers=headers)
            for name, headers in waiting.items()
        }
        time.sleep(0.5)
        assert not any(answer.done() for answer in answers.values())
        api.process.send_signal(signal.SIGTERM)
        statuses = {name: answer.result().status_code for name, answer in answers.items()}
    assert statuses == {"poll": 200, "stream": 200}
    assert api.process.wait(30) in (0, -signal.SIGTERM)


def test_hub_references_are_recorded_with_their_commits(
    api: Process, hub: HubServer, example_model: Path
) -> None:
    files = {path.name: path.read_bytes() for path in example_model.iterdir()}
    model = hub.push("org/model", files)
    texts = hub.push("org/texts", {"sets/a.jsonl": b'{"text": "hello"}\n'}, kind="datasets")
    body = {"model": "org/model", "evaluation": {"dataset": "hf:org/texts/sets/a.jsonl@main"}}
    answer = api.client.post("/v1/jobs", json=body)
    assert answer.status_code == 202, answer.text
    spec = answer.json()["spec"]
    assert spec["model"] == f"hf:org/model@{model}"
    assert spec["evaluation"]["dataset"] == f"hf:org/texts/sets/a.jsonl@{texts}"
    foreign = {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling.Own"}}
    config = json.dumps(json.loads(files["config.json"]) | foreign).encode()
    hub.push("org/model", {**files, "config.json": config, "modeling.py": b"import os"})
    refused = api.client.post("/v1/jobs", json=body)
    assert (refused.status_code, refused.json()["code"]) == (422, "model_remote_code")


def test_a_model_that_the_hub_does_not_know_is_refused(api: Process) -> None:
    answer = api.client.post("/v1/estimates", json={"model": "org/none"})
    assert (answer.status_code, answer.json()["code"]) == (422, "model_not_found")


def test_a_setting_that_can_not_work_is_told_without_a_traceback(tmp_path: Path, repository: Path) -> None:
    environment = {
        **os.environ,
        "NIBBLE_STATE_DIR": str(tmp_path),
        "NIBBLE_REDIS_URL": "foo",
        "NIBBLE_PORT": "0",
    }
    command = [sys.executable, "-m", "app.cli", "api"]
    ended = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stdout + ended.stderr
    assert "[redis_url_invalid]" in ended.stderr
    assert "remedy write redis://" in ended.stderr
