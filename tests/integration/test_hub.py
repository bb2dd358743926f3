"""Hub models over HTTP, against a local server that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.core.sources.model_source import model_digest
from tests.integration.hub_server import HubServer, hub_server

Probe = Callable[..., dict[str, Any]]


def safetensors(payload: int = 4, name: str = "a") -> bytes:
    entry = {name: {"dtype": "F32", "shape": [payload // 4], "data_offsets": [0, payload]}}
    header = json.dumps(entry).encode()
    return len(header).to_bytes(8, "little") + header + os.urandom(payload)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


@pytest.fixture
def files() -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "README.md": b"hello",
        "pytorch_model.bin": b"pickle",
        "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
        "consolidated.safetensors": safetensors(8),
        "modeling_x.py": b"raise SystemExit",
        "original/consolidated.00.pth": b"pickle",
        "model.safetensors": safetensors(3 << 20),
    }


@pytest.fixture
def probe(hub: HubServer, tmp_path: Path, repository: Path) -> Probe:
    """Run the probe against the server; what it answers."""

    def run(action: str, reference: str, **environment: str) -> dict[str, Any]:
        result = subprocess.run(
            [sys.executable, "-m", "tests.integration.hub_probe", action, reference, str(tmp_path / "cache")],
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), **environment},
            cwd=repository,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer

    return run


def test_a_branch_is_pinned_to_its_commit(hub: HubServer, probe: Probe, files: dict[str, bytes]) -> None:
    commit = hub.push("org/name", files)
    answer = probe("inspect", "org/name")
    assert answer["name"] == f"hf:org/name@{commit}"
    assert answer["tensors"] == ["a"]
    hub.push("org/name", {**files, "config.json": b"{}"})
    assert probe("inspect", answer["name"])["name"] == answer["name"]


def test_headers_are_read_without_the_weights(hub: HubServer, probe: Probe, files: dict[str, bytes]) -> None:
    hub.push("org/name", files)
    probe("inspect", "org/name")
    weights = [request for request in hub.requests if "safetensors" in request]
    assert [request.partition("bytes=")[2] for request in weights] == ["0-65535"]


def test_only_the_models_files_are_downloaded(
    hub: HubServer, probe: Probe, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.push("org/name", files)
    answer = probe("fetch", "org/name")
    wanted = {
        "additional_chat_templates/tool_use.jinja", "config.json", "model.safetensors", "tokenizer.json"
    }  # fmt: skip
    digests = {name: hashlib.sha256(files[name]).hexdigest() for name in wanted}
    assert answer["files"] == digests
    assert answer["digest"] == model_digest(digests)
    assert [name for name in sorted(files.keys() - wanted) if name in answer["notes"][0]] == [
        "consolidated.safetensors", "modeling_x.py", "original/consolidated.00.pth", "pytorch_model.bin",
    ]  # fmt: skip
    hub.requests.clear()
    assert probe("fetch", "org/name") == answer
    assert not [request for request in hub.requests if "0-3145" in request]
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_cut_download_goes_on_where_it_broke(hub: HubServer, probe: Probe, files: dict[str, bytes]) -> None:
    hub.push("org/name", files)
    hub.cuts = 4
    hub.refusals = 1
    answer = probe("fetch", "org/name")
    assert answer["files"]["model.safetensors"] == hashlib.sha256(files["model.safetensors"]).hexdigest()


def test_damaged_bytes_are_not_kept(
    hub: HubServer, probe: Probe, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.push("org/name", files)
    hub.damaged = "model.safetensors"
    answer = probe("fetch", "org/name")
    assert answer["code"] == "unavailable"
    assert "sha256" in answer["message"]
    assert not [path for path in tmp_path.glob("cache/*") if path.is_dir() and not path.suffix]
    hub.damaged = None
    assert probe("fetch", "org/name")["files"]


def test_a_missing_model_or_revision_is_refused(
    hub: HubServer, probe: Probe, files: dict[str, bytes]
) -> None:
    hub.push("org/name", files)
    for reference in ("org/other", "org/name@gone"):
        answer = probe("inspect", reference)
        assert answer["code"] == "model_not_found"
        assert answer["remedy"]


def test_a_gated_model_needs_the_token(hub: HubServer, probe: Probe, files: dict[str, bytes]) -> None:
    hub.push("org/name", files)
    hub.token = "hf_test"
    assert probe("inspect", "org/name")["code"] == "model_not_found"
    assert probe("inspect", "org/name", HF_TOKEN="hf_test")["tensors"] == ["a"]


def test_a_hub_that_does_not_answer_is_unavailable(probe: Probe) -> None:
    assert probe("inspect", "org/name", HF_ENDPOINT="http://127.0.0.1:9")["code"] == "unavailable"


def test_a_dataset_file_is_read(hub: HubServer, probe: Probe) -> None:
    hub.push("org/texts", {"data/train.jsonl": b'{"text": "x"}'}, kind="datasets")
    assert probe("text", "hf:org/texts/data/train.jsonl")["text"] == '{"text": "x"}'
    assert probe("text", "hf:org/texts/data/gone.jsonl")["code"] == "text_source_invalid"


@pytest.mark.parametrize("place", ["http://169.254.169.254/latest", "http://127.0.0.1:9/x", "file:///etc"])
def test_a_redirect_into_the_inner_network_is_not_followed(
    hub: HubServer, probe: Probe, files: dict[str, bytes], place: str
) -> None:
    hub.push("org/name", files)
    hub.redirect = place
    assert probe("inspect", "org/name")["code"] in ("destination_refused", "unavailable")
    hub.redirect = f"http://localhost:{hub.server_port}/x"  # loopback by another name than the operator's
    assert probe("inspect", "org/name")["code"] == "destination_refused"
