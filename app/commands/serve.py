"""Commands that run the service: up, api, worker."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from typing import Annotated

import typer

from app.commands.checks.devices import chosen_device
from app.commands.terminal import AsJson, print_json, read_settings


class Queue(StrEnum):
    JOBS = "jobs"
    SERVE = "serve"


WORKER_MODULES = {Queue.JOBS: "workers.main", Queue.SERVE: "workers.replicas.replica_supervisor"}


def api(*, as_json: AsJson = False) -> None:
    """Run only the HTTP API; NIBBLE_REDIS_URL names the Redis that it shares with the workers.

    With --json: log lines as JSON, as NIBBLE_LOG_FORMAT=json does.
    """
    from app.server import serve

    settings = read_settings()
    serve(settings.model_copy(update={"log_format": "json"}) if as_json else settings)


def worker(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    check: Annotated[
        bool, typer.Option("--check", help="Only check: exit 0 if a worker of this host sends heartbeats.")
    ] = False,
    queue: Annotated[
        Queue, typer.Option(help="jobs: quantize models; serve: run inference servers of deployments.")
    ] = Queue.JOBS,
    as_json: AsJson = False,
) -> None:
    """Run one worker: for jobs, or with --queue serve for deployments.

    With --json: log lines as JSON, as NIBBLE_LOG_FORMAT=json does.
    """
    if check:
        from app.commands.health import check_worker

        check_worker()
        if as_json:
            print_json({"alive": True})
        return
    if as_json:
        os.environ["NIBBLE_LOG_FORMAT"] = "json"
    read_settings()  # only to report invalid settings: the worker reads them itself
    if device != "auto":
        device = chosen_device(device)
    # The process becomes the worker: signals reach it directly, and app imports nothing of workers.
    command = [sys.executable, "-m", WORKER_MODULES[queue], "--device", device]
    os.execv(sys.executable, command)  # noqa: S606  # no shell is wanted


def up(
    *,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Every line of every process, not only warnings.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole service on this machine: Redis, API, per device a worker for jobs and one that serves.

    Prints a link to the dashboard, then warnings. Ctrl-C stops all of it. With --json: one object per line;
    the one with `"event": "ready"` has the address and a login link.
    """
    from app.commands.machine import Machine

    settings = read_settings()
    raise typer.Exit(Machine(settings, as_json=as_json, verbose=verbose).run())
