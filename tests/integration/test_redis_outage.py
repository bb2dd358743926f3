"""Redis is killed and comes back while a job runs, or loses all that it held."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.records.job import JobState
from app.core.redis.redis_programs import embedded_binary
from app.core.redis.redis_server import connect, wait_for_redis
from app.core.settings import Settings
from tests.integration.api_service import ADMIN_KEY, EXAMPLES, running_service
from tests.integration.workshop import Workshop
from tests.waiting import wait_until


class DurableValkey:
    """A Valkey process with an append-only file, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        binary = embedded_binary()
        assert binary is not None, "install the extra [embedded]"
        self.url = f"unix://{folder / 's'}"
        self._command = [
            *(binary, "--port", "0", "--unixsocket", str(folder / "s"), "--dir", str(folder)),
            *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
        ]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        client = connect(self.url)
        wait_for_redis(client)
        client.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[DurableValkey]:
    folder = tmp_path / "valkey"
    folder.mkdir()
    valkey = DurableValkey(folder)
    yield valkey
    valkey.kill()


def test_a_job_outlives_a_restart_of_redis(valkey: DurableValkey, tmp_path: Path) -> None:
    redis = connect(valkey.url)
    # The lease outlives a slow start of the server on a busy host.
    workshop = Workshop(redis, valkey.url, tmp_path / "state", lease_s=60)
    job = workshop.submit(layers="8", pause="0.3")

    def restart() -> None:
        wait_until(lambda: "checkpoint" in workshop.kinds(job))
        valkey.kill()
        time.sleep(1.5)
        valkey.start()

    thread = threading.Thread(target=restart)
    thread.start()
    ended = workshop.run(job)
    thread.join()
    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 1)
    # An event is written again if the server died between writing it and its answer.
    written = [each.payload["key"] for each in workshop.store.events(job.id) if each.kind == "checkpoint"]
    assert list(dict.fromkeys(written)) == [f"layer-{layer}" for layer in range(8)]
    assert len(written) <= 9
    redis.close()


def test_what_storage_holds_is_found_again_after_redis_lost_all(redis_url: str, tmp_path: Path) -> None:
    settings = Settings(
        state_dir=tmp_path, redis_url=redis_url, model_roots=(EXAMPLES,), bootstrap_api_key=ADMIN_KEY,
        janitor_interval_s=0.1,
    )  # fmt: skip
    with running_service(settings) as service:
        job_id = service.submit()["id"]
        artifact = service.publish(job_id, {"a": b"1"})
        service.redis.flushall()
        wait_until(lambda: service.client.get("/v1/artifacts").status_code == 200)
        (found,) = service.client.get("/v1/artifacts").json()["data"]
        assert found["id"] == artifact.id
        assert service.client.get(f"/v1/artifacts/{artifact.id}/files/a").content == b"1"
        assert service.client.get(f"/v1/jobs/{job_id}").status_code == 404
        assert service.client.get("/readyz").status_code == 200
        assert service.submit()["state"] == "queued"
        assert service.client.post("/v1/gc").json()["artifacts"] == []
        usage = service.client.get("/v1/tenants/default/limits").json()["usage"]
        assert usage["storage_bytes"] == artifact.size
