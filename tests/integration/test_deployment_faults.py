"""Deployments whose servers, workers, files and Redis fail."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.core.settings import Settings
from tests.integration.api_service import ADMIN_KEY, EXAMPLES, Service, running_service
from tests.integration.serving_floor import Floor
from tests.integration.test_redis_outage import DurableValkey
from tests.waiting import wait_until


@pytest.fixture
def floor(service: Service) -> Floor:
    return Floor(service)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file that servers wait for."""
    return tmp_path / "gate"


def test_a_server_that_dies_amid_a_stream_is_told_of_and_started_again(floor: Floor) -> None:
    with floor.worker():
        deployment_id = floor.ready("tiny")
        with floor.stream("tiny", tokens=5, die_after=2) as lines:
            events = list(lines)
        error = json.loads(events[2].removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == ("replica_lost", "service_unavailable_error")
        assert events[3:] == ["data: [DONE]"]
        wait_until(lambda: floor.chat("tiny").status_code == 200, 30)
        view = floor.await_state(deployment_id, "ready")
        assert view["servers"][0]["restarts"] == 1
        # Without a first byte there is nothing to tell but that it must be asked again.
        refused = floor.chat("tiny", die_after=1)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "replica_lost")
        assert int(refused.headers["retry-after"]) >= 1
        wait_until(lambda: floor.chat("tiny").status_code == 200, 30)


def test_another_replica_is_asked_before_the_first_byte(floor: Floor) -> None:
    with floor.worker():
        deployment_id = floor.ready("tiny", replicas=2)
        floor.await_servers(deployment_id, 2)
        pids = {floor.chat("tiny").json()["pid"] for _ in range(4)}
        victim = pids.pop()
        os.kill(victim, signal.SIGKILL)
        answers = [floor.chat("tiny") for _ in range(6)]
        assert {answer.status_code for answer in answers} == {200}
        assert victim not in {answer.json()["pid"] for answer in answers}
        floor.await_servers(deployment_id, 2)


def test_replicas_share_the_requests(floor: Floor, gate: Path) -> None:
    with floor.worker(), ThreadPoolExecutor(4) as pool:
        deployment_id = floor.deploy("tiny", replicas=2)
        floor.await_servers(deployment_id, 2)
        wait_until(lambda: len(floor.service.client.get("/v1/models").json()["data"]) == 1)
        answers = [pool.submit(floor.chat, "tiny", gate=str(gate)) for _ in range(4)]
        wait_until(lambda: all(floor.running(deployment_id, slot) == 2 for slot in range(2)))
        gate.touch()
        pids = [answer.result().json()["pid"] for answer in answers]
    assert sorted(pids.count(pid) for pid in set(pids)) == [2, 2]


def test_no_server_outlives_a_killed_worker_and_another_worker_takes_over(floor: Floor) -> None:
    with floor.worker("one") as first:
        deployment_id = floor.ready("tiny")
        assert floor.server_pids(deployment_id)
        first.kill()
        first.wait()
    wait_until(lambda: not floor.servers())
    refused = floor.chat("tiny")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "replica_lost")
    with floor.worker("two"):
        wait_until(lambda: floor.chat("tiny").status_code == 200, 30)
        assert floor.view(deployment_id)["servers"][0]["worker"] == "two"


def test_a_worker_that_ends_in_order_finishes_streams_and_frees_its_slots(floor: Floor, gate: Path) -> None:
    with floor.worker("one") as first:
        deployment_id = floor.ready("tiny")
        with floor.stream("tiny", gate=str(gate)) as lines:
            next(lines)
            first.terminate()
            wait_until(lambda: floor.view(deployment_id)["servers"][0]["state"] == "draining")
            gate.touch()
            assert list(lines)[-1] == "data: [DONE]"
        assert first.wait(20) == 0
    assert floor.view(deployment_id)["servers"] == []
    assert floor.client.get("/v1/workers").json()["data"] == []


def test_a_full_server_and_a_full_gateway_say_so(redis_url: str, tmp_path: Path, gate: Path) -> None:
    settings = Settings(
        state_dir=tmp_path / "state",
        redis_url=redis_url,
        model_roots=(EXAMPLES,),
        bootstrap_api_key=ADMIN_KEY,
        inference_limit=8,
    )
    with running_service(settings) as service, ThreadPoolExecutor(60) as pool:
        floor = Floor(service)
        with floor.worker():
            floor.ready("tiny", artifact=floor.artifact(queue=4))
            answers = [pool.submit(floor.chat, "tiny", gate=str(gate)) for _ in range(60)]
            wait_until(lambda: sum(answer.done() for answer in answers) >= 56)
            gate.touch()
            results = [answer.result() for answer in answers]
            assert floor.chat("tiny").status_code == 200
    refused = [answer for answer in results if answer.status_code != 200]
    assert len(refused) == 56
    assert {answer.status_code for answer in refused} == {429}
    assert all(answer.headers["retry-after"] for answer in refused)
    codes = {answer.json()["error"]["code"] for answer in refused}
    assert codes <= {"too_many_requests", None}


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[DurableValkey]:
    folder = tmp_path / "valkey"
    folder.mkdir()
    valkey = DurableValkey(folder)
    yield valkey
    valkey.kill()


def test_deployments_answer_while_redis_is_away_and_after(valkey: DurableValkey, tmp_path: Path) -> None:
    settings = Settings(
        state_dir=tmp_path / "state",
        redis_url=valkey.url,
        model_roots=(EXAMPLES,),
        bootstrap_api_key=ADMIN_KEY,
    )
    with running_service(settings) as service:
        floor = Floor(service)
        with floor.worker():
            deployment_id = floor.ready("tiny")
            pids = floor.server_pids(deployment_id)
            valkey.kill()
            without = [floor.chat("tiny").status_code for _ in range(5)]
            away = threading.Event()
            away.wait(3)
            without += [floor.chat("tiny").status_code for _ in range(5)]
            valkey.start()
            after = [floor.chat("tiny").status_code for _ in range(20) if not away.wait(0.1)]
            assert set(without + after) == {200}
            floor.await_state(deployment_id, "ready")
            assert floor.server_pids(deployment_id) == pids


def test_a_server_that_refuses_the_artifact_fails_the_deployment(floor: Floor) -> None:
    told = {"code": "kernel_missing", "message": "no kernel for 3 bits", "remedy": "use 4 bits"}
    with floor.worker():
        deployment_id = floor.deploy("tiny", floor.artifact(fail=told))
        view = floor.await_state(deployment_id, "failed")
        assert view["error"] == told
        assert view["reason"] == told["message"]
        wait_until(lambda: floor.chat("tiny").json()["error"]["code"] == "kernel_missing")
        assert floor.client.get("/v1/models").json()["data"] == []
        assert floor.client.delete(f"/v1/deployments/{deployment_id}").status_code in (202, 204)


def test_a_replica_that_fails_leaves_the_others_alone(floor: Floor, gate: Path) -> None:
    """A worker whose disk or memory is full must not end what another one serves."""
    told = {"code": "out_of_memory", "message": "cpu ran out of memory", "remedy": "use another"}
    with floor.worker():
        deployment_id = floor.ready(
            "tiny", artifact=floor.artifact(fail=told, fail_when=str(gate)), replicas=2
        )
        gate.touch()
        for pid in floor.server_pids(deployment_id, 1):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "cpu ran out of memory" in floor.view(deployment_id)["reason"], 30)
        view = floor.view(deployment_id)
        assert (view["state"], view["error"], len(view["servers"])) == ("ready", None, 1)
        assert floor.chat("tiny").status_code == 200


def test_a_damaged_file_is_found_before_it_is_served(floor: Floor) -> None:
    artifact = floor.artifact()
    floor.service.objects.put(f"artifacts/{artifact}/attempt-1/weights/a.bin", b"y" * 1000)
    with floor.worker():
        deployment_id = floor.deploy("tiny", artifact)
        wait_until(lambda: "SHA-256" in floor.view(deployment_id)["reason"], 30)
        assert not (floor.service.settings.state_dir / "cache" / "artifacts" / artifact).exists()
        # The stored file is mended while the worker tries again.
        floor.service.objects.put(f"artifacts/{artifact}/attempt-1/weights/a.bin", b"x" * 1000)
        floor.await_state(deployment_id, "ready")
