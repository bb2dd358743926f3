"""Wakes waiting requests of this process when a job changes."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from app.core.changes.redis_keys import JOB_CHANGES

log = logging.getLogger(__name__)

POLL_S = 0.1  # how long `stop` may take
RECONNECT_S = 1.0


class ChangeListener(threading.Thread):
    """Reads the channel of changes in a thread and wakes the event loop's waiters."""

    def __init__(self, redis: Redis, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(name="changes", daemon=True)
        self._redis: Any = redis
        self._loop = loop
        self._stopped = threading.Event()
        self.is_closing = False
        self._waiters: dict[str, set[asyncio.Event]] = {}  # touched by the loop's thread only

    @contextmanager
    def watch(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set at each change of the job. Watch first, then read: nothing is missed."""
        changed = asyncio.Event()
        self._waiters.setdefault(job_id, set()).add(changed)
        try:
            yield changed
        finally:
            waiters = self._waiters[job_id]
            waiters.discard(changed)
            if not waiters:
                del self._waiters[job_id]

    def run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._listen()
            except RedisError as fault:
                log.warning("lost the channel of changes: %s", fault)
                self._stopped.wait(RECONNECT_S)

    def _listen(self) -> None:
        with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
            channel.subscribe(JOB_CHANGES)
            self._post(None)  # what changed before this moment was not heard
            while not self._stopped.is_set():
                message = channel.get_message(timeout=POLL_S)
                if message is not None:
                    self._post(message["data"].decode())

    def _post(self, job_id: str | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, job_id)

    def _wake(self, job_id: str | None) -> None:
        chosen = self._waiters.values() if job_id is None else [self._waiters.get(job_id, set())]
        for waiters in chosen:
            for changed in waiters:
                changed.set()

    def release(self) -> None:
        """Wake every waiter for good: the service is about to end."""
        self.is_closing = True
        self._post(None)

    def stop(self) -> None:
        self._stopped.set()
        self.join()
