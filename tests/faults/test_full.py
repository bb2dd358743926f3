"""Memory and disks that are full: a clean refusal, nothing half done, and all is well once there is room."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import httpx
import psutil
import pytest
from redis import Redis

from app.core.redis.redis_programs import embedded_binary
from app.core.redis.redis_server import connect, wait_for_redis
from app.core.settings import Settings
from tests.integration.api_service import ADMIN_KEY, EXAMPLES, MODEL, Service, running_service
from tests.integration.workshop import REPOSITORY
from tests.waiting import wait_until


@contextmanager
def durable_redis(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server with an append-only file, which meets a full disk with an error instead of a signal."""
    binary = embedded_binary()
    assert binary is not None, "install the extra [embedded]"
    folder.mkdir(exist_ok=True)
    command = [binary, "--port", "0", "--unixsocket", str(folder / "s"), "--dir", str(folder)]
    command += ["--appendonly", "yes", "--appendfsync", "everysec", "--save", ""]
    with (
        (folder / "log").open("ab") as log,
        subprocess.Popen(
            command, stdout=log, stderr=log, preexec_fn=lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        ) as process,
    ):
        url = f"unix://{folder / 's'}"
        client = connect(url)
        wait_for_redis(client)
        client.close()
        try:
            yield url, process
        finally:
            process.kill()


def settings_for(url: str, folder: Path) -> Settings:
    return Settings(
        state_dir=folder, redis_url=url, model_roots=(EXAMPLES,), bootstrap_api_key=ADMIN_KEY,
        janitor_interval_s=300,
    )  # fmt: skip


def post(service: Service, key: str) -> httpx.Response:
    return service.client.post("/v1/jobs", json={"model": MODEL}, headers={"Idempotency-Key": key})


def test_a_redis_without_memory_records_no_half_job(service: Service) -> None:
    redis: Redis = service.redis
    before = len(service.client.get("/v1/jobs").json()["data"])
    redis.config_set("maxmemory", 1024**2)
    try:
        refused = post(service, "key-1")
        assert (refused.status_code, refused.json()["code"]) == (503, "redis_unavailable")
        assert "retry-after" in refused.headers
        assert service.client.get("/v1/jobs").status_code in (200, 503)
    finally:
        redis.config_set("maxmemory", 0)
    assert len(service.client.get("/v1/jobs").json()["data"]) == before
    assert service.store.counts()["queued"] == before  # type: ignore[index]
    made = post(service, "key-1")
    assert made.status_code == 202
    assert service.queue.locate(service.store.load(made.json()["id"])) is not None


def test_what_was_accepted_survives_a_full_disk_of_redis(tmp_path: Path) -> None:
    accepted: list[str] = []

    def submit(service: Service) -> int:
        answer = post(service, uuid4().hex)
        if answer.status_code == 202:
            accepted.append(answer.json()["id"])
        return answer.status_code

    with durable_redis(tmp_path / "redis") as (url, process):
        with running_service(settings_for(url, tmp_path / "state")) as service:
            assert submit(service) == 202
            redis = psutil.Process(process.pid)
            hard = redis.rlimit(psutil.RLIMIT_FSIZE)[1]
            redis.rlimit(psutil.RLIMIT_FSIZE, (1, hard))
            wait_until(lambda: submit(service) == 503)
            redis.rlimit(psutil.RLIMIT_FSIZE, (hard, hard))
            wait_until(lambda: submit(service) == 202)
            wait_until(lambda: service.redis.info("persistence")["aof_last_write_status"] == "ok")
            service.redis.waitaof(1, 0, 10_000)
        process.kill()
        process.wait()
    with durable_redis(tmp_path / "redis") as (url, _):
        client = connect(url)
        assert [job for job in accepted if not client.exists(f"nibble:job:{job}")] == []
        client.close()


def test_a_full_disk_of_the_storage_is_an_error_and_leaves_no_object(tmp_path: Path) -> None:
    program = """
import json, resource, sys
from pathlib import Path
from app.core.errors import Unavailable
from app.core.storage.object_store import ObjectStore
objects = ObjectStore(Path(sys.argv[1]).as_uri())
objects.put("a/kept", b"x")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
codes = []
for write in (lambda: objects.put("a/lost", b"x" * 100_000), lambda: objects.create("a/lost", b"x" * 100_000),
              lambda: objects.put("a/lost", iter([b"x" * 50_000] * 2))):
    try:
        write()
    except Unavailable as fault:
        codes.append(fault.code)
print(json.dumps([codes, [head.key for head in objects.list("a")]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "objects")],
        capture_output=True, text=True, check=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert json.loads(done.stdout) == [["storage_unavailable"] * 3, ["a/kept"]]


@pytest.fixture
def service(redis_url: str, tmp_path: Path) -> Iterator[Service]:
    with running_service(settings_for(redis_url, tmp_path / "state")) as service:
        yield service
