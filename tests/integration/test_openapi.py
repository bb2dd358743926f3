"""Requests made up from the service's own description: no 5xx, and no answer that it does not describe."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.core.records.artifact import ArtifactFile, ArtifactManifest
from app.core.records.ids import artifact_id
from app.core.records.specs import Recipe
from app.core.storage.artifact_store import file_key
from app.core.storage.object_store import ObjectStore
from app.core.storage.storage_keys import manifest_key
from tests.integration.api_service import ADMIN_KEY, EXAMPLES, MODEL
from tests.integration.hub_server import hub_server

# `make fuzz` sets EXAMPLES for the long form. It also visits every boundary of every schema, and follows what
# one answer tells of (an id, a cursor) into the next request.
EXAMPLES_PER_OPERATION = os.environ.get("EXAMPLES")
PHASES = "fuzzing" if EXAMPLES_PER_OPERATION is None else "examples,coverage,fuzzing,stateful"
SEED = os.environ.get("SEED", "1")
# The servers behind these are no part of this test; `/login` takes codes, not keys.
SKIPPED = r"^/v1/(chat/)?completions|^/login"

# What the document allows is not refused with 400 or 422, but for these: a body may keep to its schema
# and name a model that doesn't exist, hold what is no text, or fields that do not go together or with the
# record; and an Idempotency-Key may have come with another body before.
CONTENT_DECIDES = (
    *("POST /v1/jobs", "POST /v1/estimates", "POST /v1/recommendations", "POST /v1/datasets"),
    *("PATCH /v1/artifacts/{artifact_id}", "PATCH /v1/deployments/{deployment_id}"),
    *("POST /v1/deployments", "POST /v1/keys", "POST /v1/artifacts/{artifact_id}/push"),
    "POST /v1/jobs/{job_id}/retry",
)
ANSWERS = ["2xx", "3xx", "401", "403", "404", "409", "412", "413", "416", "429", "5xx"]
CHECKS = f"[checks]\npositive_data_acceptance.expected-statuses = {json.dumps(ANSWERS)}\n" + "".join(
    f'[[operations]]\ninclude-name = "{name}"\n'
    f"checks.positive_data_acceptance.expected-statuses = {json.dumps([*ANSWERS, '422'])}\n"
    for name in CONTENT_DECIDES
)
HEADERS = {"Authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture
def api_url(tmp_path: Path, repository: Path) -> Iterator[str]:
    """The API as a process, with a hub that knows no model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with hub_server() as hub:
        environment = {
            **os.environ,
            "NIBBLE_STATE_DIR": str(tmp_path / "state"),
            "NIBBLE_PORT": str(port),
            "NIBBLE_MODEL_ROOTS": str(EXAMPLES),
            "NIBBLE_BOOTSTRAP_API_KEY": ADMIN_KEY,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
        }
        command = [sys.executable, "-m", "app.cli", "api"]
        with (tmp_path / "api.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=repository, env=environment, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 60
            while not ready(url):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield url
        finally:
            process.kill()
            process.wait()


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_the_service_keeps_to_its_description(api_url: str, tmp_path: Path) -> None:
    made = httpx.post(f"{api_url}/v1/jobs", json={"model": MODEL}, headers=HEADERS, trust_env=False)
    assert made.status_code == 202
    judge(api_url, tmp_path, CHECKS)


@pytest.mark.skipif(EXAMPLES_PER_OPERATION is None, reason="the long form: make fuzz")
def test_what_exists_is_described(api_url: str, tmp_path: Path) -> None:
    """The routes of single resources again, now with ids of a job, an artifact and a deployment."""
    with httpx.Client(base_url=api_url, headers=HEADERS, trust_env=False) as client:
        job = client.post("/v1/jobs", json={"model": MODEL}).json()
        artifact = published(tmp_path / "state", job)
        body = {"artifact": artifact, "name": "chat"}
        deployment = client.post("/v1/deployments", json=body).json()["id"]
    known = {"job_id": job["id"], "artifact_id": artifact, "deployment_id": deployment, "name": "chat"}
    routes = [
        *("GET /v1/jobs/{job_id}", "GET /v1/jobs/{job_id}/events", "GET /v1/jobs/{job_id}/report"),
        *("POST /v1/jobs/{job_id}/retry", "GET /v1/jobs/{job_id}/webhook-deliveries"),
        *("GET /v1/artifacts/{artifact_id}", "GET /v1/artifacts/{artifact_id}/files/{path}"),
        *("POST /v1/artifacts/{artifact_id}/links", "DELETE /v1/artifacts/{artifact_id}"),
        *("GET /v1/deployments/{deployment_id}", "GET /v1/models/{name}"),
        "GET /v1/deployments/{deployment_id}/servers/{slot}/metrics",
    ]
    ids = "".join(
        f'[[operations]]\ninclude-name = "{route}"\nparameters = {{ {name} = "{value}" }}\n'
        for route in routes
        for name, value in known.items()
        if f"{{{name}}}" in route
    )
    judge(
        api_url,
        tmp_path,
        CHECKS + ids,
        "--include-path-regex",
        r"\{(job_id|artifact_id|deployment_id|name)\}",
    )


def published(state: Path, job: dict[str, Any]) -> str:
    """The id of an artifact with one file, as a worker would leave it."""
    content, objects = b'{"a": 1}', ObjectStore((state / "storage").as_uri())
    file = ArtifactFile(path="a", size=len(content), sha256=sha256(content).hexdigest())
    manifest = ArtifactManifest(
        id=artifact_id(job["id"], 0, "awq"),
        tenant="default",
        job=job["id"],
        created_at=job["created_at"],
        model=MODEL,
        model_digest="0" * 64,
        recipe=Recipe(),
        format="awq",
        prefix="attempt-1",
        files=(file,),
    )
    objects.put(file_key(manifest, "a"), content)
    objects.create(manifest_key(manifest.id), manifest.model_dump_json().encode())
    return manifest.id


def judge(api_url: str, folder: Path, configuration: str, *options: str) -> None:
    (folder / "schemathesis.toml").write_text(configuration)
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{api_url}/openapi.json"),
        *("-H", f"Authorization: Bearer {ADMIN_KEY}", "--checks", "all", "--phases", PHASES),
        *("--max-examples", EXAMPLES_PER_OPERATION or "4", "--seed", SEED, "--exclude-path-regex", SKIPPED),
        *("--no-color", *options),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout
    assert "Tested:" in done.stdout
