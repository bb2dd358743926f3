"""Artifacts on their way to a hub: over the API, against a server that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.core.access.api_keys import Scope
from app.core.records.artifact import ArtifactManifest
from tests.integration.api_service import Service
from tests.integration.hub_server import HubServer, hub_server
from tests.waiting import wait_until

TOKEN = "hf_secretsecretsecret"
WEIGHTS = os.urandom(300_000)
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS, "empty.txt": b""}
REPORT = {
    "evaluation": {"dataset": "builtin:wikitext2", "windows": 4, "sequence_length": 64},
    "calibration": {"dataset": "builtin:wikitext2", "windows": 8, "sequence_length": 32, "seed": 3},
    "original": {"perplexity": 10.0},
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server() as server:
        server.writers = {TOKEN: "write", "hf_reader": "read"}
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        yield server


@pytest.fixture
def artifact(service: Service) -> ArtifactManifest:
    job = service.submit(webhook={"url": "https://1.1.1.1/hook", "events": ["artifact.pushed"]})
    manifest = service.publish(job["id"], FILES, format_name="compressed-tensors")
    service.end(job["id"], artifacts=(manifest.id,))
    figures = {"recipe_index": 0, "recipe": manifest.recipe.model_dump(mode="json"), "perplexity": 10.5}
    report = json.dumps({**REPORT, "candidates": [figures]})
    service.objects.put(f"reports/{job['id']}.json", report.encode())
    return manifest


def ended(service: Service, push: dict[str, Any]) -> dict[str, Any]:
    def state() -> dict[str, Any]:
        answer = service.client.get(push["links"]["self"])
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        return document

    def waits() -> object:
        return state()["error"] if state()["state"] == "pending" else None

    wait_until(lambda: state()["state"] in ("pushed", "failed"), 20, failure=waits)
    return state()


def pushed(service: Service, art_id: str, **body: Any) -> dict[str, Any]:
    answer = service.client.post(
        f"/v1/artifacts/{art_id}/push", json={"repo_id": "org/name", "hub_token": TOKEN, **body}
    )
    assert answer.status_code == 202, answer.text
    return ended(service, answer.json())


def test_a_push_writes_the_files_and_a_card(
    service: Service, hub: HubServer, artifact: ArtifactManifest
) -> None:
    push = pushed(service, artifact.id)
    assert push["state"] == "pushed", push
    commit, files = hub.find("models", "org/name", "main") or ("", {})
    assert push["commit"] == commit
    assert push["commit_url"] == f"{hub.url}/org/name/commit/{commit}"
    assert push["url"] == f"{hub.url}/org/name"
    assert {name: files[name] for name in FILES} == FILES
    assert files["README.md"].startswith(b"---\n")
    assert b"256 tokens in all" in files["README.md"]
    assert hub.private["org/name"]
    view = service.client.get(f"/v1/artifacts/{artifact.id}").json()
    assert [(each["id"], each["state"]) for each in view["pushes"]] == [(push["id"], "pushed")]
    events = service.store.events(artifact.job)
    assert [event.payload["commit"] for event in events if event.kind == "push"] == [commit]
    deliveries = service.client.get(f"/v1/jobs/{artifact.job}/webhook-deliveries").json()["data"]
    assert [each["type"] for each in deliveries] == ["artifact.pushed"]


def test_a_push_writes_what_huggingface_hub_writes(
    service: Service, hub: HubServer, artifact: ArtifactManifest, tmp_path: Path, repository: Path
) -> None:
    """The library uploads the same folder; then it downloads what we pushed."""
    hub.part_bytes = 100_000
    assert pushed(service, artifact.id)["state"] == "pushed"
    ours = (hub.find("models", "org/name", "main") or ("", {}))[1]
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in ours.items():
        (folder / name).write_bytes(content)
    hub.objects.clear()
    environment = {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"], "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "tests.integration.hub_upload_probe",
        str(folder),
        str(tmp_path / "got"),
        *ours,
    ]
    subprocess.run(command, env=environment, cwd=repository, check=True, timeout=120)
    theirs = (hub.find("models", "org/theirs", "main") or ("", {}))[1]
    assert theirs == ours
    parts = [path for path in hub.sent if re.fullmatch(r"/lfs/[0-9a-f]{64}/\d+", path)]
    assert len(parts) == 6  # three parts of ours, three of the library's
    assert {name: (tmp_path / "got" / name).read_bytes() for name in ours} == ours


def test_the_same_push_again_sends_and_commits_nothing(
    service: Service, hub: HubServer, artifact: ArtifactManifest
) -> None:
    first = pushed(service, artifact.id)
    sent, commits = list(hub.sent), len(hub.commits["models", "org/name"])
    second = pushed(service, artifact.id)
    assert (second["state"], second["commit"]) == ("pushed", first["commit"])
    assert second["id"] != first["id"]
    assert (hub.sent, len(hub.commits["models", "org/name"])) == (sent, commits)
    # Elsewhere the contents are there already.
    other = pushed(service, artifact.id, repo_id="org/other", private=False, revision="v1")
    assert other["state"] == "pushed", other
    assert hub.sent == sent
    assert not hub.private["org/other"]
    assert "model.safetensors" not in (hub.find("models", "org/other", "main") or ("", {}))[1]
    assert "model.safetensors" in (hub.find("models", "org/other", "v1") or ("", {}))[1]


def test_a_repeated_request_pushes_once(service: Service, hub: HubServer, artifact: ArtifactManifest) -> None:
    body, headers = {"repo_id": "org/name", "hub_token": TOKEN}, {"Idempotency-Key": "once"}
    path = f"/v1/artifacts/{artifact.id}/push"
    ids = {service.client.post(path, json=body, headers=headers).json()["id"] for _ in range(3)}
    assert len(ids) == 1


def test_a_cut_upload_is_sent_again(service: Service, hub: HubServer, artifact: ArtifactManifest) -> None:
    hub.cut_uploads = 2
    assert pushed(service, artifact.id)["state"] == "pushed"
    assert len(hub.sent) == 1
    assert hub.objects == {hashlib.sha256(WEIGHTS).hexdigest(): WEIGHTS}


def test_shards_of_an_earlier_model_go(service: Service, hub: HubServer, artifact: ArtifactManifest) -> None:
    theirs = {
        "model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}",
        "notes.md": b"mine", "extra/adapter.safetensors": b"2",
    }  # fmt: skip
    hub.push("org/name", theirs)
    assert pushed(service, artifact.id)["state"] == "pushed"
    files = (hub.find("models", "org/name", "main") or ("", {}))[1]
    assert set(files) == {*FILES, "README.md", "notes.md", "extra/adapter.safetensors"}


def test_damaged_files_are_not_pushed(service: Service, hub: HubServer, artifact: ArtifactManifest) -> None:
    key = f"artifacts/{artifact.id}/{artifact.prefix}/model.safetensors"
    service.objects.put(key, bytes([WEIGHTS[0] ^ 1]) + WEIGHTS[1:])
    push = pushed(service, artifact.id)
    assert (push["state"], push["error"]["code"]) == ("failed", "storage_corrupt")
    assert hub.objects == {}
    assert "model.safetensors" not in (hub.find("models", "org/name", "main") or ("", {}))[1]


@pytest.mark.parametrize(
    ("place", "status", "words"),
    [
        ("/api/repos/create", 403, "You don't have the rights to create a model under this namespace"),
        ("/commit/main", 400, "Invalid metadata in README.md"),
        ("objects/batch", 413, "too large"),
    ],
)
def test_a_refusal_of_the_hub_is_the_pushs_reason(
    service: Service, hub: HubServer, artifact: ArtifactManifest, place: str, status: int, words: str
) -> None:
    hub.deny = {place: (status, words)}
    push = pushed(service, artifact.id)
    assert (push["state"], push["error"]["code"]) == ("failed", "push_refused")
    assert words in push["error"]["message"]
    assert push["error"]["remedy"]
    assert push["finished_at"]


def test_a_hub_that_fails_is_asked_again_later(
    service: Service, hub: HubServer, artifact: ArtifactManifest
) -> None:
    hub.deny = {"/commit/main": (503, "down for maintenance")}
    body = {"repo_id": "org/name", "hub_token": TOKEN}
    push = service.client.post(f"/v1/artifacts/{artifact.id}/push", json=body).json()

    def now() -> dict[str, Any]:
        document: dict[str, Any] = service.client.get(push["links"]["self"]).json()
        return document

    wait_until(lambda: now()["error"] is not None)
    assert now()["state"] == "pending"
    assert "down for maintenance" in now()["error"]["message"]
    hub.deny = {}
    service.redis.zadd("nibble:pushes:due", {push["id"]: 0})  # the next try, now
    wait_until(lambda: now()["attempt"] == 2)
    done = ended(service, push)
    assert (done["state"], done["attempt"], done["error"]) == ("pushed", 2, None)
    assert len(hub.sent) == 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"repo_id": "name", "hub_token": TOKEN}, "validation_failed"),
        ({"repo_id": "org/name", "revision": "a..b", "hub_token": TOKEN}, "validation_failed"),
        ({"repo_id": "org/name", "hub_token": "two words"}, "validation_failed"),
        ({"repo_id": "org/name", "hub_token": ["x"]}, "validation_failed"),
        ({"repo_id": "org/name", "hub_token": "hf_unknown"}, "hub_token_refused"),
        ({"repo_id": "org/name", "hub_token": "hf_reader"}, "hub_token_refused"),
        ({"repo_id": "org/name"}, "hub_token_missing"),
    ],
)
def test_what_can_not_be_pushed_is_refused_at_once(
    service: Service, hub: HubServer, artifact: ArtifactManifest, body: dict[str, Any], code: str
) -> None:
    answer = service.client.post(f"/v1/artifacts/{artifact.id}/push", json=body)
    assert answer.status_code == 422
    assert (answer.json()["code"], bool(answer.json()["remedy"])) == (code, True)
    assert "two words" not in answer.text
    assert service.client.get(f"/v1/artifacts/{artifact.id}").json()["pushes"] == []


def test_the_services_own_token_pushes_for_operators_alone(
    service: Service, hub: HubServer, artifact: ArtifactManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    path, body = f"/v1/artifacts/{artifact.id}/push", {"repo_id": "org/name"}
    with service.client_with(service.key(Scope.ADMIN)) as tenant:
        answer = tenant.post(path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, "hub_token_missing")
    push = service.client.post(path, json=body)
    assert push.status_code == 202, push.text
    assert ended(service, push.json())["state"] == "pushed"
    with service.client_with(service.key(Scope.ARTIFACTS_READ)) as reader:
        assert reader.post(path, json=body).status_code == 403


def test_a_job_pushes_its_first_artifact(service: Service, hub: HubServer) -> None:
    job = service.submit(push={"repo_id": "org/job", "commit_message": "from a job"}, hub_token=TOKEN)
    assert job["has_hub_token"]
    manifest = service.publish(job["id"], FILES)
    service.end(job["id"], artifacts=(manifest.id,))
    (push,) = service.client.get(f"/v1/artifacts/{manifest.id}").json()["pushes"]
    assert ended(service, push)["state"] == "pushed"
    assert "model.safetensors" in (hub.find("models", "org/job", "main") or ("", {}))[1]
    kinds = [event.payload["state"] for event in service.store.events(job["id"]) if event.kind == "push"]
    assert kinds == ["pending", "pushed"]
    service.outcome.follow_up(job["id"])
    assert len(service.client.get(f"/v1/artifacts/{manifest.id}").json()["pushes"]) == 1


def test_a_deleted_artifact_takes_its_pushes_with_it(
    service: Service, hub: HubServer, artifact: ArtifactManifest
) -> None:
    hub.deny = {"/commit/main": (503, "down")}
    body = {"repo_id": "org/name", "hub_token": TOKEN}
    push = service.client.post(f"/v1/artifacts/{artifact.id}/push", json=body).json()
    assert service.client.delete(f"/v1/artifacts/{artifact.id}").status_code == 204
    assert service.client.get(push["links"]["self"]).status_code == 404
    wait_until(lambda: service.redis.keys("nibble:push*") == [])
    assert service.redis.keys("nibble:hub-token:*") == []
