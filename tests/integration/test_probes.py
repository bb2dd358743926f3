"""Probes beside a busy loop, and new connections behind many kept ones."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from app import probes
from app.core.errors import Unavailable
from app.core.redis.redis_server import resolve_redis
from app.core.settings import Settings
from app.server import ApiServer, api_server
from tests.integration.api_service import ADMIN_KEY
from tests.waiting import wait_until

FLOOD = 300  # kept connections that ask again as soon as they are answered
ASK = (f"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {ADMIN_KEY}\r\n\r\n").encode()
LIMIT_S = 60.0  # of a client: it is reached only by who starves


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> Settings:
    return Settings(
        state_dir=tmp_path / "state", redis_url=redis_url, bootstrap_api_key=ADMIN_KEY, port=free_port(),
        probe_port=free_port(),
    )  # fmt: skip


@contextmanager
def running(settings: Settings) -> Iterator[ApiServer]:
    """The service in a thread of the test."""
    api = api_server(settings)
    thread = threading.Thread(target=api.run, name="api")
    thread.start()
    try:
        wait_until(lambda: api.started, failure=lambda: "" if thread.is_alive() else "the API has ended")
        yield api
    finally:
        api.should_exit = True
        thread.join()


def client_of(port: int | None) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S, trust_env=False)


def in_turn(api: ApiServer, call: Callable[[], object]) -> None:
    """Let the loop of the requests make this call."""
    api.servers[0].get_loop().call_soon_threadsafe(call)


def test_probes_have_a_port_of_their_own_and_the_other_one(settings: Settings) -> None:
    with running(settings), client_of(settings.probe_port) as probe, client_of(settings.port) as client:
        for asked in (probe, client):
            assert (asked.get("/healthz").status_code, asked.get("/healthz").json()) == (
                200,
                {"status": "ok"},
            )
            assert asked.get("/readyz").json()["checks"] == {"redis": "ok", "storage": "ok"}
            assert "nibble_http_requests_total" in asked.get("/metrics").text
        assert probe.get("/v1/jobs").status_code == 404
    with client_of(settings.probe_port) as probe, pytest.raises(httpx.ConnectError):
        probe.get("/healthz")


def test_without_redis_the_probe_is_not_ready(settings: Settings, tmp_path: Path) -> None:
    with ExitStack() as stack:
        redis = stack.enter_context(resolve_redis(Settings(state_dir=tmp_path / "own")))
        own = settings.model_copy(update={"redis_url": redis.url})
        stack.enter_context(running(own))
        probe = stack.enter_context(client_of(settings.probe_port))
        assert probe.get("/readyz").status_code == 200
        redis.stop()
        answer = probe.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
        assert probe.get("/healthz").status_code == 200


def test_a_loop_that_hangs_is_noticed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "SILENCE_LIMIT_S", 2.0)
    go_on = threading.Event()
    with running(settings) as api, client_of(settings.probe_port) as probe:
        assert probe.get("/healthz").status_code == 200
        in_turn(api, lambda: go_on.wait(LIMIT_S))
        try:
            wait_until(lambda: probe.get("/healthz").status_code == 503)
            assert probe.get("/healthz").json()["status"] == "hangs"
            assert probe.get("/readyz").status_code == 200
        finally:
            go_on.set()
        wait_until(lambda: probe.get("/healthz").status_code == 200)


def test_many_new_connections_are_taken_in_one_turn(settings: Settings) -> None:
    """With one descriptor uvloop takes one in each turn, and a turn is as long as all requests of it."""
    newcomers, go_on, turns = 128, threading.Event(), 0
    with running(settings) as api, ExitStack() as stack:
        loop = api.servers[0].get_loop()
        seen: list[int] = []

        def count() -> None:
            nonlocal turns
            turns += 1
            if len(api.server_state.connections) < newcomers:
                loop.call_soon(count)
            else:
                seen.append(turns)

        in_turn(api, lambda: go_on.wait(LIMIT_S))
        in_turn(api, count)
        for _ in range(newcomers):
            stack.enter_context(socket.create_connection(("127.0.0.1", settings.port), LIMIT_S))
        go_on.set()
        wait_until(lambda: seen)
    assert seen[0] < newcomers / 4


def test_a_flood_holds_up_neither_probes_nor_new_connections(settings: Settings, repository: Path) -> None:
    environment = {
        **os.environ,
        "NIBBLE_STATE_DIR": str(settings.state_dir),
        "NIBBLE_REDIS_URL": str(settings.redis_url),
        "NIBBLE_BOOTSTRAP_API_KEY": ADMIN_KEY,
        "NIBBLE_PORT": str(settings.port),
        "NIBBLE_PROBE_PORT": str(settings.probe_port),
    }
    command = [sys.executable, "-m", "app.cli", "api"]
    with subprocess.Popen(command, cwd=repository, env=environment) as process:
        try:
            wait_until(lambda: answers(settings.port), failure=process.poll)
            statuses = asyncio.run(flooded(settings))
        finally:
            process.kill()
    assert statuses == [200] * 5


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


async def flooded(settings: Settings) -> list[int]:
    """What newcomers are answered while `FLOOD` connections ask without a pause."""
    flood = [asyncio.create_task(ask_for_ever(settings.port)) for _ in range(FLOOD)]
    await asyncio.sleep(1)
    try:
        statuses = []
        for port, path in [
            (settings.probe_port, "/healthz"), (settings.probe_port, "/readyz"),
            (settings.probe_port, "/metrics"), (settings.port, "/healthz"), (settings.port, "/readyz"),
        ]:  # fmt: skip
            async with httpx.AsyncClient(timeout=LIMIT_S, trust_env=False) as newcomer:
                statuses.append((await newcomer.get(f"http://127.0.0.1:{port}{path}")).status_code)
        assert not [task for task in flood if task.done()], "the flood has ended by itself"
        return statuses
    finally:
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)


async def ask_for_ever(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while True:
            writer.write(ASK)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            size = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(size.partition(b":")[2]))
    finally:
        writer.close()


def test_a_taken_port_of_probes_is_told(settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable) as refusal:
            api_server(settings.model_copy(update={"probe_port": port}))
    assert refusal.value.code == "port_taken"
    assert "NIBBLE_PROBE_PORT" in refusal.value.remedy
