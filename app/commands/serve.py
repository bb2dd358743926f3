"""Commands that run the service: up, api, worker."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from app.commands.terminal import read_settings


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
        from app.commands.health import check_worker

        check_worker()
        return
    # The process becomes the worker: signals reach it directly, and app imports nothing of workers.
    command = [sys.executable, "-m", "workers.main", "--device", device]
    os.execv(sys.executable, command)  # noqa: S606  # no shell is wanted


def up() -> None:
    """Run the whole service on this machine: Redis, API, one worker per device."""
    from app.commands.machine import Machine

    settings = read_settings()
    raise typer.Exit(Machine(settings).run())
