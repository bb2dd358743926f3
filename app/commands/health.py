"""The health check of a worker's container."""

from __future__ import annotations

import socket

from redis.exceptions import RedisError

from app.commands.terminal import read_settings
from app.core.errors import Unavailable
from app.core.jobs.worker_registry import WorkerRegistry
from app.core.redis.redis_server import connect


def check_worker() -> None:
    """Raises Unavailable if no worker of this host is live."""
    settings = read_settings()
    if settings.redis_url is None:
        raise Unavailable(
            "NIBBLE_REDIS_URL is not set, so heartbeats can't be read", code="redis_unknown",
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
