"""The installed service from outside: `nibble up`, a job over the terminal, and how it all ends."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from app.client import NibbleClient
from tests.e2e.installed import START_LIMIT_S, STOP_LIMIT_S, Service, running_service
from tests.waiting import wait_until

JOB = {
    "recipe": {"method": "awq", "bits": 4, "group_size": 128, "search": {"grid_points": 4}},
    "calibration": {"num_samples": 8, "sequence_length": 128},
    "evaluation": {"num_samples": 4},
    "formats": ["awq", "compressed-tensors"],
    "deploy": {"name": "wiki"},
}


def runs(process: psutil.Process, module: str) -> bool:
    try:
        return module in process.cmdline()
    except psutil.Error:  # it has just ended
        return False


def is_worker(process: psutil.Process) -> bool:
    return runs(process, "workers.main")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, example_model: Path) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with running_service(folder, example_model.parent, folder / "models") as running:
        yield running


@pytest.fixture
def doomed(tmp_path: Path, example_model: Path) -> Iterator[Service]:
    """A service that its test ends."""
    with running_service(tmp_path, example_model.parent) as running:
        yield running


def with_broken_weight(model: Path, folder: Path) -> Path:
    """A copy of the model whose very last weight is infinite."""
    shutil.copytree(model, folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", math.inf))
    return folder


def cluttered(model: Path, folder: Path) -> Path:
    """A copy as publishers ship models: with code, and with what others have left beside the weights."""
    shutil.copytree(model, folder)
    header = b'{"model.norm.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    stray = len(header).to_bytes(8, "little") + header + bytes(4)
    for name in ("model_old.safetensors", "consolidated.safetensors", "adapter_model.safetensors"):
        (folder / name).write_bytes(stray)
    for name in ("modeling_llama.py", "handler.py", "pytorch_model.bin"):
        (folder / name).write_text("raise SystemExit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_llama.X"}}))
    return folder


def stored(storage: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file of the artifacts."""
    files = [path for path in (storage / "artifacts").rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_a_job_from_submission_to_checked_files(
    service: Service, example_model: Path, tmp_path: Path
) -> None:
    spec = tmp_path / "job.json"
    spec.write_text(json.dumps(JOB))
    model = cluttered(example_model, service.log.parent / "models" / "cluttered")
    submitted = service.nibble("submit", str(model), "--spec", str(spec), "--watch", "--json")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job = json.loads(submitted.stdout.splitlines()[-1])
    assert job["state"] == "succeeded"
    assert len(job["artifacts"]) == 2

    report = service.nibble("report", job["id"], "--json")
    figures = json.loads(report.stdout)
    assert 1 < figures["original"]["perplexity"] < figures["candidates"][0]["perplexity"] < 100
    assert any("model_old.safetensors" in note for note in figures["notes"])
    assert any("auto_map in config.json" in note for note in figures["notes"])

    out = tmp_path / "artifact"
    downloaded = service.nibble("artifacts", "download", job["artifacts"][0], "-o", str(out))
    assert downloaded.returncode == 0, downloaded.stderr
    assert "quantization_config" in json.loads((out / "config.json").read_text())
    assert {path.name for path in out.iterdir()} == {
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert "auto_map" not in (out / "config.json").read_text()

    # A job that can't be done ends with a remedy, and leaves what is stored as it is.
    folder = service.log.parent
    before = stored(folder / "state" / "storage")
    broken = with_broken_weight(example_model, folder / "models" / "broken")
    failed = service.nibble("submit", str(broken), "--watch", "--json")
    assert failed.returncode == 1
    ended = json.loads(failed.stdout.splitlines()[-1])
    assert (ended["state"], ended["error"]["code"]) == ("failed", "weights_not_finite")
    assert ended["error"]["remedy"]
    assert stored(folder / "state" / "storage") == before
    assert len(before) > 2
    with NibbleClient(service.url) as client:
        assert client.ready()

    # The job has deployed its first artifact; the terminal waits until it has loaded.
    said = service.nibble("chat", "wiki", "The history of", "--temperature", "0", "--max-tokens", "8")
    assert said.returncode == 0, said.stderr + service.log.read_text()[-3000:]
    assert said.stdout.strip()
    assert "wiki" in service.nibble("deployments").stdout
    deleted = service.nibble("deployments", "delete", "wiki", "--yes")
    assert deleted.returncode == 0, deleted.stderr
    wait_until(lambda: not any(runs(each, "workers.serving") for each in service.members()), STOP_LIMIT_S)


def test_bad_input_is_refused_with_a_remedy_and_the_service_stays_ready(
    service: Service, tmp_path: Path
) -> None:
    for model in ("../../etc", str(tmp_path), "file:///etc"):
        refused = service.nibble("submit", model)
        assert refused.returncode == 1
        assert "remedy" in refused.stderr
    with NibbleClient(service.url) as client:
        assert client.ready()


def test_a_killed_worker_is_replaced(service: Service) -> None:
    worker = next(member for member in service.members() if is_worker(member))
    worker.kill()
    wait_until(lambda: "starting it again" in service.log.read_text(), START_LIMIT_S)
    wait_until(lambda: any(is_worker(each) and each != worker for each in service.members()), START_LIMIT_S)
    assert service.process.poll() is None


def test_sigterm_stops_everything(doomed: Service) -> None:
    members = doomed.members()
    assert len(members) >= 3
    doomed.process.send_signal(signal.SIGTERM)
    assert doomed.process.wait(STOP_LIMIT_S) == 0
    _, alive = psutil.wait_procs(members, timeout=10)
    assert alive == []


def test_nothing_outlives_a_killed_up(doomed: Service) -> None:
    members = doomed.members()
    assert len(members) >= 3
    doomed.process.kill()
    doomed.process.wait()
    _, alive = psutil.wait_procs(members, timeout=20)
    assert alive == []
