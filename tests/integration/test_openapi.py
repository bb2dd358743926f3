"""Requests made up from the service's own description: no 5xx, and no answer that it does not describe."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.api_service import ADMIN_KEY, EXAMPLES, MODEL
from tests.integration.hub_server import hub_server

# EXAMPLES=20 makes the long form, which also visits every boundary of every schema.
EXAMPLES_PER_OPERATION = os.environ.get("EXAMPLES")
PHASES = "fuzzing" if EXAMPLES_PER_OPERATION is None else "coverage,fuzzing"
# The servers behind these are no part of this test; `/login` takes codes, not keys.
SKIPPED = r"^/v1/(chat/)?completions|^/login"


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
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    made = httpx.post(f"{api_url}/v1/jobs", json={"model": MODEL}, headers=headers, trust_env=False)
    assert made.status_code == 202
    # A body may keep to its schema and still name a model that doesn't exist.
    (tmp_path / "schemathesis.toml").write_text(
        '[checks]\npositive_data_acceptance.expected-statuses = ["2xx", "3xx", "4xx"]\n'
    )
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{api_url}/openapi.json"),
        *("-H", f"Authorization: Bearer {ADMIN_KEY}", "--checks", "all", "--phases", PHASES),
        *("--max-examples", EXAMPLES_PER_OPERATION or "4", "--seed", "1", "--exclude-path-regex", SKIPPED),
        "--no-color",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout
    assert "Tested:" in done.stdout
