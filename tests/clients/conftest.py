"""A deployment of a model that has learned its answers, behind the gateway; and clients that are not ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.core.settings import Settings
from tests.clients.results import Client, Document
from tests.clients.taught_model import AFTER, CALLED, SAID, taught_artifact
from tests.integration.api_service import ADMIN_KEY, Service, running_service
from tests.integration.serving_floor import Floor
from tests.servers import valkey
from tests.tiny_models import TOKENIZER
from tests.waiting import wait_until

PROBES = Path(__file__).parent / "probes"
CLIENTS = Path(os.environ.get("CLIENTS", PROBES.parents[2] / ".clients")).resolve()
NAME = "org/taught"
LIMIT_S = 280


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A running API with a worker that serves the model as NAME."""
    folder = tmp_path_factory.mktemp("clients")
    artifact = taught_artifact(folder)
    files = {
        path.relative_to(artifact).as_posix(): path.read_bytes()
        for path in artifact.rglob("*")
        if path.is_file()
    }
    with valkey(folder) as redis_url:
        settings = Settings(
            state_dir=folder / "state",
            redis_url=redis_url,
            model_roots=(TOKENIZER.parent,),
            bootstrap_api_key=ADMIN_KEY,
            janitor_interval_s=300,
        )
        with running_service(settings) as service:
            floor = Floor(service)
            manifest = service.publish(service.submit()["id"], files, format_name="compressed-tensors")
            with floor.worker(real=True) as worker:
                deployment_id = floor.deploy(NAME, manifest.id)
                wait_until(
                    lambda: floor.view(deployment_id)["state"] == "ready",
                    120,
                    failure=lambda: worker.poll() is not None and floor.log_of(),
                )
                yield service
                worker.terminate()
                worker.wait(60)


@pytest.fixture(scope="module")
def scene(service: Service) -> dict[str, Any]:
    """What a probe has to know: the server, and what its model answers."""
    return {
        "url": service.url,
        "base": f"{service.url}/v1",  # where OpenAI's routes are
        "model": NAME,
        "key": ADMIN_KEY,
        "said": SAID,  # to a question
        "called": CALLED,  # where tools are offered
        "after": AFTER,  # to a tool's result
        "tokenizer": str(TOKENIZER),
    }


def probed(client: Client, scene: dict[str, Any], folder: Path) -> Document:
    """What the client's probe wrote; skips where the client is not installed."""
    command = node_command(client) if client.is_node else [sys.executable, str(PROBES / client.probe)]
    variables = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    if client.pins != "openai-3":  # which is in the environment of the tests
        variables["PYTHONPATH"] = str(installed(client.pins) / "site-packages")
    return written(command, scene, folder, **variables)


def written(command: list[str], scene: dict[str, Any], folder: Path, **variables: str) -> Document:
    """What a probe wrote."""
    question, answer = folder / "scene.json", folder / "document.json"
    question.write_text(json.dumps(scene))
    done = subprocess.run(
        [*command, str(question), str(answer)],
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **variables},
        capture_output=True, text=True, check=False, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, (done.stderr + done.stdout)[-3000:]
    return Document.model_validate_json(answer.read_text("utf-8"))


def node_command(client: Client) -> list[str]:
    """Node looks for modules beside the program alone."""
    for name in (client.probe, "rows.mjs"):
        shutil.copy(PROBES / name, installed(client.pins) / name)
    return ["node", str(installed(client.pins) / client.probe)]


def installed(pins: str) -> Path:
    """The folder of what is installed by these pins; skips where it is not.

    PyPI's packages are in `site-packages`: by that name dill knows a library.
    """
    folder = CLIENTS / pins
    if not (folder / "pins").exists():
        pytest.skip(f"{pins} is not installed: make clients")
    return folder
