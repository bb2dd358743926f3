"""Commands that run the service: up, api, worker."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from typing import Annotated

import typer

from app.commands.terminal import read_settings


class Queue(StrEnum):
    JOBS = "jobs"
    SERVE = "serve"


WORKER_MODULES = {Queue.JOBS: "workers.main", Queue.SERVE: "workers.serving_supervisor"}


def api() -> None:
    """Run the HTTP API alone."""
    from app.server import serve

    serve(read_settings())


def worker(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    check: Annotated[
        bool, typer.Option("--check", help="Run none: exit 0 if a worker of this host sends heartbeats.")
    ] = False,
    queue: Annotated[
        Queue, typer.Option(help="jobs: quantizes; serve: runs inference servers for deployments.")
    ] = Queue.JOBS,
) -> None:
    """Run one worker."""
    if check:
        from app.commands.health import check_worker

        check_worker()
        return
    # The process becomes the worker: signals reach it directly, and app imports nothing of workers.
    command = [sys.executable, "-m", WORKER_MODULES[queue], "--device", device]
    os.execv(sys.executable, command)  # noqa: S606  # no shell is wanted


def up() -> None:
    """Run the whole service on this machine: Redis, API, per device a worker for jobs and one that serves."""
    from app.commands.machine import Machine

    settings = read_settings()
    raise typer.Exit(Machine(settings).run())
