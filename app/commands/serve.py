"""Commands that run the service: up, api, worker."""

from __future__ import annotations

import os
import socket
import sys
from typing import Annotated

import typer
from redis.exceptions import RedisError

from app.commands.terminal import read_settings
from app.core.errors import Unavailable
from app.core.redis_server import connect
from app.core.worker_registry import WorkerRegistry


def api() -> None:
    """Run the HTTP API alone."""
    from app.server import serve

    serve(read_settings())


def worker(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    check: Annotated[
        bool, typer.Option("--check", help="Run none: exit 0 if a worker of this host sends heartbeats.")
    ] = False,
) -> None:
    """Run one worker."""
    if check:
        check_worker()
        return
    # The process becomes the worker: signals reach it directly, and app imports nothing of workers.
    command = [sys.executable, "-m", "workers.main", "--device", device]
    os.execv(sys.executable, command)  # noqa: S606  # no shell is wanted


def check_worker() -> None:
    """For health checks of containers. Raises Unavailable if this host has no living worker."""
    settings = read_settings()
    if settings.redis_url is None:
        raise Unavailable(
            "NIBBLE_REDIS_URL is not set: there is nobody to ask", code="redis_unknown",
            remedy="set it to the Redis that the worker uses",
        )  # fmt: skip
    host = socket.gethostname()
    try:
        living = WorkerRegistry(connect(settings.redis_url)).living()
    except RedisError as fault:
        raise Unavailable(
            f"Redis does not answer: {fault}", code="redis_unavailable", remedy="check NIBBLE_REDIS_URL"
        ) from fault
    if not any(worker.host == host for worker in living):
        raise Unavailable(
            f"no worker of {host} sends heartbeats", code="worker_silent", remedy="read the worker's log"
        )


def up() -> None:
    """Run the whole service on this machine: Redis, API, one worker per device."""
    from app.commands.machine import Machine

    settings = read_settings()
    raise typer.Exit(Machine(settings).run())
