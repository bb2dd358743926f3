"""Pushes whose process dies, is halted or stops: without an API, so that nobody else takes them up."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import SecretStr
from redis import Redis

from app.core.access.hub_tokens import HubTokens
from app.core.errors import InvalidRequest
from app.core.pushes.push_store import PushStore
from app.core.records.artifact import ArtifactFile, ArtifactManifest
from app.core.records.ids import artifact_id, new_id
from app.core.records.push import Push, PushState
from app.core.records.specs import PushOptions, Recipe
from app.core.settings import Settings
from app.core.storage.artifact_store import file_key
from app.core.storage.object_store import ObjectStore
from app.core.storage.storage_keys import manifest_key
from tests.integration.hub_server import HubServer, hub_server
from tests.integration.push_probe import pusher
from tests.waiting import wait_until

TOKEN = SecretStr("hf_secretsecretsecret")
HOLD_S = 1.0
SHARDS = {f"model-0000{number}.safetensors": os.urandom(200_000) for number in (1, 2, 3)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server() as server:
        server.writers = {TOKEN.get_secret_value(): "write"}
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        yield server


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> Settings:
    return Settings(state_dir=tmp_path / "state", redis_url=redis_url)


def recorded(redis: Redis, settings: Settings, files: dict[str, bytes]) -> Push:
    """A push that is due, of an artifact with these files."""
    job, objects = new_id("job"), ObjectStore(settings.object_store_url)
    manifest = ArtifactManifest(
        id=artifact_id(job, 0, "awq"),
        tenant="default",
        job=job,
        created_at=datetime.now(UTC),
        model="hf:org/source@" + "a" * 40,
        model_digest="0" * 64,
        recipe=Recipe(group_size=128),
        format="awq",
        prefix="attempt-1",
        files=tuple(
            ArtifactFile(path=path, size=len(content), sha256=hashlib.sha256(content).hexdigest())
            for path, content in files.items()
        ),
    )
    for path, content in files.items():
        objects.put(file_key(manifest, path), content)
    objects.create(manifest_key(manifest.id), manifest.model_dump_json().encode())
    push = Push(
        id=new_id("push"),
        tenant="default",
        artifact=manifest.id,
        job=job,
        options=PushOptions(repo_id="org/name"),
        has_hub_token=True,
        created_at=datetime.now(UTC),
    )
    HubTokens(redis, settings).keep(push.id, TOKEN)
    assert PushStore(redis).create(push)
    return push


def process_environment(hub: HubServer, settings: Settings) -> dict[str, str]:
    """For a process of its own, which reads the hub's address when it starts."""
    return {
        **os.environ, "HF_ENDPOINT": hub.url, "NIBBLE_REDIS_URL": str(settings.redis_url),
        "NIBBLE_STATE_DIR": str(settings.state_dir),
    }  # fmt: skip


def test_a_killed_push_goes_on_and_sends_nothing_twice(
    hub: HubServer, redis: Redis, settings: Settings, repository: Path
) -> None:
    push, store = recorded(redis, settings, SHARDS), PushStore(redis)
    last = hashlib.sha256(SHARDS["model-00003.safetensors"]).hexdigest()
    hub.halted, hub.halt_at = threading.Event(), last
    command = [sys.executable, "-m", "tests.integration.push_probe", str(HOLD_S)]
    with subprocess.Popen(command, env=process_environment(hub, settings), cwd=repository) as process:
        wait_until(lambda: f"PUT /lfs/{last}" in hub.requests, failure=process.poll)
        process.send_signal(signal.SIGKILL)
    hub.halted.set()
    assert len(hub.sent) == 2
    other = pusher(settings, HOLD_S)
    wait_until(other.push_due, 20)
    done = store.get("default", push.id, artifact=push.artifact)
    assert (done.state, done.attempt) == (PushState.PUSHED, 2)
    uploads = [path for path in hub.sent if path != f"/lfs/{last}"]
    assert len(uploads) == len(set(uploads)) == 2
    files = (hub.find("models", "org/name", "main") or ("", {}))[1]
    assert {name: files[name] for name in SHARDS} == SHARDS
    assert len(hub.commits["models", "org/name"]) == 2  # the repository's first one, and ours
    assert redis.keys("nibble:hub-token:*") == []


def test_a_stopped_push_is_left_to_another_process(hub: HubServer, redis: Redis, settings: Settings) -> None:
    push = recorded(redis, settings, SHARDS)
    hub.halted, hub.halt_at = threading.Event(), ""
    first, second = pusher(settings, 60), pusher(settings, 60)
    thread = threading.Thread(target=first.push_due)
    thread.start()
    wait_until(lambda: any(each.startswith("PUT") for each in hub.requests))
    first.stopping.set()
    hub.halted.set()
    thread.join(20)
    assert not thread.is_alive()
    left = PushStore(redis).get("default", push.id, artifact=push.artifact)
    assert left.state is PushState.PENDING
    assert not first.push_due()
    assert second.push_due()
    assert PushStore(redis).get("default", push.id, artifact=push.artifact).state is PushState.PUSHED


def test_a_stale_attempt_changes_nothing(redis: Redis, settings: Settings) -> None:
    push, store = recorded(redis, settings, {}), PushStore(redis)
    stale = store.take(hold_s=0.0)
    assert stale is not None
    assert (stale.id, stale.attempt, stale.state) == (push.id, 1, PushState.PUSHING)
    newer = store.take(hold_s=60.0)
    assert newer is not None
    assert newer.attempt == 2
    assert store.take(hold_s=60.0) is None
    done = stale.model_copy(update={"state": PushState.PUSHED})
    assert not store.write(done, attempt=stale.attempt, again_in_s=None)
    assert store.write(newer.model_copy(update={"state": PushState.FAILED}), attempt=2, again_in_s=None)
    assert not store.write(newer, attempt=2, again_in_s=0.0), "it has ended"
    assert store.take(hold_s=60.0) is None


def test_a_push_with_another_hosts_key_says_so(hub: HubServer, redis: Redis, settings: Settings) -> None:
    push = recorded(redis, settings, SHARDS)
    other = settings.model_copy(update={"secret_key": SecretStr("another")})
    with pytest.raises(InvalidRequest, match="encrypted with another key") as refused:
        HubTokens(redis, other).of(push.id)
    assert "NIBBLE_SECRET_KEY" in refused.value.remedy
    assert pusher(other, 60).push_due()
    done = PushStore(redis).get("default", push.id, artifact=push.artifact)
    assert done.error is not None
    assert (done.state, done.error.code) == (PushState.FAILED, "hub_token_unreadable")


def test_a_push_holds_chunks_not_files(
    hub: HubServer, redis: Redis, settings: Settings, repository: Path
) -> None:
    """128 MB more in the artifact: the process that pushes grows by a few chunks of 8 MB."""
    peaks = []
    for size in (1 << 20, 128 << 20):
        recorded(redis, settings, {"model.safetensors": os.urandom(16) + bytes(size)})
        hub.part_bytes = 32 << 20
        result = subprocess.run(
            [sys.executable, "-m", "tests.integration.push_probe", "60"],
            env=process_environment(hub, settings),
            cwd=repository,
            check=True,
            capture_output=True,
            timeout=60,
        )
        peaks.append(int(result.stdout))
    assert len(hub.sent) == 1 + 5
    assert peaks[1] - peaks[0] < 64_000, peaks  # kB
