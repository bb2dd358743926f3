"""`nibble doctor` against servers that are set up wrongly."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
from redis import Redis

from app.commands.checks.check import Check
from app.commands.checks.host import check_port
from app.commands.checks.redis_checks import check_clock, check_redis, check_version
from app.commands.checks.storage_checks import check_storage
from app.core.redis.redis_programs import embedded_binary
from app.core.redis.redis_server import connect, resolve_redis, wait_for_redis
from app.core.settings import Settings
from tests.integration.api_service import Service
from tests.integration.cutting_proxy import CuttingProxy
from tests.servers import running

KEEPING = ("--appendonly", "yes", "--maxmemory", "100mb", "--maxmemory-policy", "noeviction")


@contextmanager
def valkey(folder: Path, *options: str) -> Iterator[str]:
    """The URL of a server with these options."""
    binary = embedded_binary()
    assert binary is not None
    command = [binary, "--port", "0", "--unixsocket", str(folder / "s"), "--save", "", "--dir", str(folder)]
    with subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL) as process:
        try:
            url = f"unix://{folder / 's'}"
            client = connect(url)
            wait_for_redis(client)
            client.close()
            yield url
        finally:
            process.terminate()


def found(url: str) -> dict[str, Check]:
    return {check.name: check for check in check_redis(Settings(redis_url=url))}


def test_a_redis_as_it_should_be(tmp_path: Path) -> None:
    with valkey(tmp_path, *KEEPING) as url:
        checks = found(url)
        assert {check.status for check in checks.values()} == {"ok"}
        assert checks.keys() == {"redis", "redis memory", "redis persistence", "clock"}
        redis: Redis = connect(url)
        late = check_clock(redis, clock=lambda: time.time() - 90)
        early = check_clock(redis, clock=lambda: time.time() + 5)
        redis.close()
    assert (late.status, early.status) == ("problem", "warning")
    assert "behind" in late.finding
    assert "ahead" in early.finding


def test_a_redis_that_forgets(tmp_path: Path) -> None:
    with valkey(tmp_path, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru") as url:
        checks = found(url)
        assert checks["redis memory"].status == "problem"
        assert "allkeys-lru" in checks["redis memory"].finding
        assert "noeviction" in checks["redis memory"].remedy
        assert checks["redis persistence"].status == "problem"
        assert "appendonly yes" in checks["redis persistence"].remedy
        redis: Redis = connect(url)
        redis.config_set("maxmemory", 0)
        assert found(url)["redis memory"].status == "warning"
        redis.config_set("maxmemory-policy", "noeviction")
        used = int(redis.info("memory")["used_memory"])
        redis.config_set("maxmemory", used + used // 10)
        assert "of maxmemory is used" in found(url)["redis memory"].finding
        redis.close()


def test_a_replica_and_an_old_redis() -> None:
    assert "primary" in check_version({"redis_version": "7.2.4", "role": "slave"}).remedy
    assert check_version({"redis_version": "5.0.7", "role": "master"}).status == "problem"


def test_a_redis_that_does_not_answer_shows_no_password() -> None:
    (check,) = check_redis(Settings(redis_url="redis://:hunter2@127.0.0.1:9/0"))
    assert check.status == "problem"
    assert "hunter2" not in check.finding + check.remedy


def test_a_redis_that_wants_a_password(tmp_path: Path) -> None:
    with valkey(tmp_path, *KEEPING) as url:
        redis: Redis = connect(url)
        redis.config_set("requirepass", "secret")
        redis.close()
        (check,) = found(url).values()
    assert check.status == "problem"
    assert "password" in check.finding


def test_the_server_of_this_machine_is_looked_at_while_it_runs(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "state")
    (before,) = check_redis(settings)
    assert "will be started" in before.finding
    with resolve_redis(settings):
        assert {check.status for check in check_redis(settings)} == {"ok"}


def test_storage_without_conditional_writes(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(storage_url="s3://nibble/p")
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    assert check_storage(settings).status == "problem"  # there is no such bucket
    client.create_bucket(Bucket="nibble")
    assert check_storage(settings).status == "ok"
    with running(CuttingProxy(s3_endpoint)) as proxy:
        proxy.replaced = (b"if-none-match:", b"x-not-known-s3:")
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        check = check_storage(settings)
    assert check.status == "problem"
    assert "conditional write" in check.finding
    assert "Contents" not in client.list_objects_v2(Bucket="nibble"), "the probe was left behind"


def test_storage_that_cannot_be_reached(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert check_storage(Settings(storage_url=(tmp_path / "file" / "x").as_uri())).status == "problem"
    assert check_storage(Settings(storage_url="gopher://x")).remedy.startswith("use file://")


def test_a_port_that_is_ours_and_one_that_is_not(service: Service, redis_url: str) -> None:
    def at(url: str) -> Check:
        return check_port(Settings(port=int(url.rpartition(":")[2])))

    assert at(service.url).status == "ok"
    assert "Nibble service answers" in at(service.url).finding
    with running(CuttingProxy("http://127.0.0.1:9")) as other:
        check = at(other.url)
    assert check.status == "problem"
    assert "NIBBLE_PORT" in check.remedy
