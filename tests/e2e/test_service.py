"""The installed service from outside: `nibble up`, a job over the terminal, and how it all ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from app.client import NibbleClient

START_LIMIT_S = 90.0
STOP_LIMIT_S = 40.0
JOB = {
    "recipe": {"method": "awq", "bits": 4, "group_size": 128, "search": {"grid_points": 4}},
    "calibration": {"num_samples": 8, "sequence_length": 128},
    "evaluation": {"num_samples": 4},
    "formats": ["awq", "compressed-tensors"],
}


class Service:
    """A running `nibble up` and its environment."""

    def __init__(self, state: Path, model_root: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.environment = {
            **os.environ,
            "NIBBLE_STATE_DIR": str(state),
            "NIBBLE_PORT": str(port),
            "NIBBLE_MODEL_ROOTS": str(model_root),
        }
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "up"], env=self.environment, stdout=out, stderr=out
            )

    def await_ready(self) -> None:
        wait_for(lambda: "ready at" in self.log.read_text() or self.process.poll() is not None, START_LIMIT_S)
        assert self.process.poll() is None, self.log.read_text()

    def members(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def nibble(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "app.cli", *arguments],
            env=self.environment, capture_output=True, text=True, check=False, timeout=240,
        )  # fmt: skip


def is_worker(process: psutil.Process) -> bool:
    try:
        return "workers.main" in process.cmdline()
    except psutil.Error:  # it has just ended
        return False


def wait_for(condition: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("the condition did not become true")
        time.sleep(0.1)


@pytest.fixture
def service(tmp_path: Path, example_model: Path) -> Iterator[Service]:
    running = Service(tmp_path / "state", example_model.parent, tmp_path / "up.log")
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


def test_a_job_from_submission_to_checked_files(
    service: Service, example_model: Path, tmp_path: Path
) -> None:
    spec = tmp_path / "job.json"
    spec.write_text(json.dumps(JOB))
    submitted = service.nibble("submit", str(example_model), "--spec", str(spec), "--watch", "--json")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job = json.loads(submitted.stdout.splitlines()[-1])
    assert job["state"] == "succeeded"
    assert len(job["artifacts"]) == 2

    report = service.nibble("report", job["id"], "--json")
    assert json.loads(report.stdout)["candidates"][0]["perplexity"] > 1

    out = tmp_path / "artifact"
    downloaded = service.nibble("artifacts", "download", job["artifacts"][0], "-o", str(out))
    assert downloaded.returncode == 0, downloaded.stderr
    assert "quantization_config" in json.loads((out / "config.json").read_text())
    assert list(out.glob("*.safetensors"))


def test_bad_input_is_refused_with_a_remedy_and_the_service_stays_ready(
    service: Service, tmp_path: Path
) -> None:
    for model in ("../../etc", str(tmp_path), "file:///etc"):
        refused = service.nibble("submit", model)
        assert refused.returncode == 1
        assert "remedy" in refused.stderr
    with NibbleClient(service.url) as client:
        assert client.ready()


def test_sigterm_stops_everything(service: Service) -> None:
    members = service.members()
    assert len(members) >= 3
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(STOP_LIMIT_S) == 0
    _, alive = psutil.wait_procs(members, timeout=10)
    assert alive == []


def test_nothing_outlives_a_killed_up(service: Service) -> None:
    members = service.members()
    assert len(members) >= 3
    service.process.kill()
    service.process.wait()
    _, alive = psutil.wait_procs(members, timeout=20)
    assert alive == []


def test_a_killed_worker_is_replaced(service: Service) -> None:
    worker = next(member for member in service.members() if is_worker(member))
    worker.kill()
    wait_for(lambda: "starting it again" in service.log.read_text(), START_LIMIT_S)
    wait_for(lambda: any(is_worker(member) for member in service.members()), START_LIMIT_S)
    assert service.process.poll() is None
