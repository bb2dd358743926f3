"""Real parts for integration tests: an S3 server process, the service, servers of models."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from app.core.records.specs import Recipe
from app.core.settings import Settings
from tests.integration.api_service import ADMIN_KEY, EXAMPLES, Service, running_service
from tests.integration.inference_process import InferenceProcess, inference_server
from tests.servers import seaweedfs
from tests.tiny_models import EngineRun, random_model, save_model, tiny_spec


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of an S3 server process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    endpoint = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for_http(endpoint)
        yield endpoint
        process.terminate()


@pytest.fixture
def s3_endpoint(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An S3 server without buckets, and the AWS_* variables that lead there."""
    httpx.post(f"{s3_server}/moto-api/reset", timeout=30).raise_for_status()
    for name, value in s3_variables(s3_server).items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def seaweedfs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an S3 server that checks signatures, as docker-compose.yml has it."""
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as endpoint:
        wait_for_http(endpoint)
        yield endpoint


@pytest.fixture
def seaweedfs_endpoint(seaweedfs_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same as `s3_endpoint`."""
    s3 = s3_client(seaweedfs_server)
    for bucket in s3.list_buckets()["Buckets"]:
        for entry in s3.list_objects_v2(Bucket=bucket["Name"]).get("Contents", []):
            s3.delete_object(Bucket=bucket["Name"], Key=entry["Key"])
        s3.delete_bucket(Bucket=bucket["Name"])
    for name, value in s3_variables(seaweedfs_server).items():
        monkeypatch.setenv(name, value)
    return seaweedfs_server


@pytest.fixture(params=["s3_endpoint", "seaweedfs_endpoint"])
def any_s3_endpoint(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def s3_variables(endpoint: str) -> dict[str, str]:
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    return {"AWS_ENDPOINT_URL": endpoint, **keys, "AWS_REGION": "us-east-1"}


def s3_client(endpoint: str) -> Any:
    """A client that is not ours."""
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)


def wait_for_http(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            httpx.get(url, timeout=5)
        except httpx.TransportError:
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.05)
        else:
            return


@pytest.fixture
def service(redis_url: str, tmp_path: Path) -> Iterator[Service]:
    """A running API over an empty Valkey and a local folder."""
    settings = Settings(
        state_dir=tmp_path / "state",
        redis_url=redis_url,
        model_roots=(EXAMPLES, tmp_path),
        bootstrap_api_key=ADMIN_KEY,
        janitor_interval_s=300,
        max_body_bytes=100_000,
        queue_limit=20,
    )
    with running_service(settings) as service:
        yield service


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random llama of two layers, rounded to 4 bits, by format; only awq has zero points."""
    folder = tmp_path_factory.mktemp("artifacts")
    model = save_model(random_model("llama"), folder / "model")
    symmetric = Recipe(method="rtn", group_size=32, symmetric=True)
    runs = [
        EngineRun(tiny_spec(symmetric, formats=("compressed-tensors", "gptq")), model, folder / "symmetric"),
        EngineRun(
            tiny_spec(Recipe(method="rtn", group_size=32), formats=("awq",)), model, folder / "asymmetric"
        ),
    ]
    return {output.format: run.work / output.folder for run in runs for output in run.finished.outputs}


@pytest.fixture(scope="session")
def small_artifact(artifacts: dict[str, Path]) -> Path:
    return artifacts["compressed-tensors"]


@pytest.fixture(scope="session", params=["rows", "traced"])
def inference(small_artifact: Path, request: pytest.FixtureRequest) -> Iterator[InferenceProcess]:
    """A running inference server on it: steps as on a CPU, and as on a GPU with the stand-in for graphs."""
    steps = {"rows": (), "traced": ("--steps", "traced", "--kernel-backend", "torch")}[request.param]
    with inference_server(small_artifact, "--dtype", "float32", *steps) as running:
        yield running
