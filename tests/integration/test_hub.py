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
from tests.adapters import GOLDEN
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


def test_an_adapter_is_pinned_like_the_model(hub: HubServer, probe: Probe, example_model: Path) -> None:
    def pushed(name: str, folder: Path) -> str:
        commit = hub.push(name, {path.name: path.read_bytes() for path in folder.iterdir()})
        return f"hf:{name}@{commit}"

    model, adapter = pushed("org/base", example_model), pushed("me/tuned", GOLDEN / "bundled")
    assert probe("submit", "org/base me/tuned") == {"model": model, "adapter": adapter}
    pushed("me/tuned", GOLDEN / "lora")
    assert probe("submit", f"org/base {adapter}") == {"model": model, "adapter": adapter}
    assert probe("submit", "org/base me/tuned")["code"] == "adapter_mismatch"
    gone = probe("submit", "org/base me/none")
    assert (gone["code"], gone["param"]) == ("model_not_found", "adapter")


def test_headers_are_read_without_the_weights(hub: HubServer, probe: Probe, files: dict[str, bytes]) -> None:
    hub.push("org/name", files)
    probe("inspect", "org/name")
    assert all("/api/models/org/name/" in each or "/org/name/resolve/" in each for each in hub.requests)
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


LISTING, FILE = "/api/", "/resolve/"
GATED = "Access to model org/name is restricted and you are not in the authorized list."
# What the hub answers: the place, the status and what it says of the cause; our code, what our message must
# hold, and what the remedy must hold without and with a token.
REFUSALS: list[tuple[int, dict[str, str], str, str, str, str]] = [
    (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": GATED}, "model_gated", GATED,
     "accept its terms at", "HF_TOKEN) accept the terms"),
    (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": GATED}, "model_gated", GATED,
     "accept its terms at", "HF_TOKEN) accept the terms"),
    (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "model_forbidden",
     "Invalid credentials", "renew HF_TOKEN", "renew HF_TOKEN"),
    (401, {"X-Error-Code": "RepoNotFound"}, "model_not_found", "does not exist, or is private",
     "set HF_TOKEN", "account of the token"),
    (401, {}, "model_not_found", "status 401", "set HF_TOKEN", "account of the token"),
    (403, {"X-Error-Message": "Access to this resource is disabled."}, "model_forbidden",
     "Access to this resource is disabled.", "HF_TOKEN", "the permission to read"),
    (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, "model_not_found",
     "Repository not found", "check the id", "check the id"),
    (404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id: main"}, "model_not_found",
     "does not exist in this revision", "branch, tag or commit", "branch, tag or commit"),
    (404, {"X-Error-Code": "EntryNotFound"}, "model_not_found", "lacks the file", "files of", "files of"),
    (404, {}, "model_not_found", "status 404", "check the id", "check the id"),
    (400, {"X-Error-Message": "Bad revision"}, "model_not_found", "Bad revision", "check id", "check id"),
    (429, {"X-Error-Message": "Too many requests"}, "unavailable", "Too many requests",
     "with a hub_token", "with a hub_token"),
    (500, {}, "unavailable", "500", "try again later", "try again later"),
]  # fmt: skip


@pytest.mark.parametrize("place", [LISTING, FILE])
@pytest.mark.parametrize("token", [None, "hf_test"])
def test_each_refusal_of_the_hub_has_its_reason_and_a_remedy(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes], place: str, token: str | None, repository: Path
) -> None:
    """In one process: the answers change while it asks."""
    hub.push("org/name", files)
    program = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from app.core.errors import NibbleError\n"
        "from tests.integration.hub_probe import look\n"
        "for line in sys.stdin:\n"
        "    try: look('inspect', 'org/name', Path('.')); said = {}\n"
        "    except NibbleError as e: said = {'code': e.code, 'message': e.message, 'remedy': e.remedy}\n"
        "    print(json.dumps(said), flush=True)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    environment |= {} if token is None else {"HF_TOKEN": token}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, cwd=repository, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        for status, headers, code, reason, without, with_token in REFUSALS:
            if place == FILE and status in (429, 500):  # those are tried again, for seconds
                continue
            hub.answers = {place: (status, b"", headers)}
            process.stdin.write("ask\n")
            process.stdin.flush()
            said = json.loads(process.stdout.readline())
            assert said["code"] == code
            assert reason in said["message"]
            assert (without if token is None else with_token) in said["remedy"]
        process.stdin.close()


@pytest.mark.parametrize("body", [b"<html>Please log in</html>", b"[]", b'{"sha": "main"}', b""])
def test_what_is_no_hub_is_told_in_words(hub: HubServer, probe: Probe, body: bytes) -> None:
    hub.answers = {LISTING: (200, body, {"Content-Type": "text/html; charset=utf-8"})}
    answer = probe("inspect", "org/name")
    assert answer["code"] == "unavailable"
    assert "does not answer for org/name as a hub does (text/html)" in answer["message"]
    assert "pydantic" not in answer["message"]
    assert "\n" not in answer["message"]
    assert "HF_ENDPOINT" in answer["remedy"]


def test_a_hub_that_is_away_is_named_with_what_to_check(probe: Probe) -> None:
    answer = probe("inspect", "org/name", HF_ENDPOINT="http://hub.invalid")
    assert answer["code"] == "unavailable"
    assert "http://hub.invalid" in answer["message"]
    assert "HF_ENDPOINT" in answer["remedy"]
    assert "file:///" in answer["remedy"]


@pytest.mark.parametrize(("action", "reference"), [("inspect", "org/name"), ("text", "hf:org/texts/a.jsonl")])
def test_an_offline_hub_is_not_asked(hub: HubServer, probe: Probe, action: str, reference: str) -> None:
    answer = probe(action, reference, HF_HUB_OFFLINE="1")
    assert answer["code"] == ("hub_offline" if action == "inspect" else "text_source_invalid")
    assert "HF_HUB_OFFLINE" in answer["message"]
    assert "file:///" in answer["remedy"]
    assert hub.requests == []


def test_a_gated_dataset_has_the_same_remedy(hub: HubServer, probe: Probe) -> None:
    hub.push("org/texts", {"a.jsonl": b'{"text": "x"}'}, kind="datasets")
    hub.answers = {LISTING: (403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": GATED})}
    answer = probe("text", "hf:org/texts/a.jsonl")
    assert answer["code"] == "text_source_invalid"
    assert GATED in answer["message"]
    assert f"accept its terms at {hub.url}/datasets/org/texts" in answer["remedy"]
