"""Looks after a running attempt from a thread of its own: renews the lease and sees when to stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from enum import StrEnum

from redis.exceptions import RedisError

from app.core.errors import NotFound, RecordUnreadable
from app.core.jobs.job_store import JobStore
from app.core.records.job import Job, JobState
from app.core.records.job_changes import is_executing

log = logging.getLogger(__name__)

TICK_S = 0.2
LOOK_S = 1.0  # how often the record is read: a request to cancel must be seen soon


class StopReason(StrEnum):
    CANCELLED = "cancelled"  # its owner asked
    DEADLINE = "deadline"  # it ran longer than `timeout_s`
    LEASE_LOST = "lease_lost"  # another attempt may have begun
    SHUTDOWN = "shutdown"  # this worker stops


class Stopped(Exception):
    """The attempt must end now."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason)
        self.reason = reason


class Watch:
    """Watches one attempt. `check` raises Stopped once there is a reason; `on_stop` is called then, once."""

    def __init__(self, store: JobStore, job: Job, *, lease_s: float, shutdown: threading.Event) -> None:
        self._store = store
        self._job = job
        self._lease_s = lease_s
        self._shutdown = shutdown
        self._deadline = time.monotonic() + job.spec.timeout_s
        self._renewed = time.monotonic()
        self._looked = 0.0
        self._reason: StopReason | None = None
        self._on_stop: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *fault: object) -> None:
        self._ended.set()
        self._thread.join()

    def check(self) -> None:
        """Raise Stopped if the attempt must end."""
        if self._reason is not None:
            raise Stopped(self._reason)

    def on_bytes(self, _: int) -> None:
        """`check`, in the shape in which downloads report."""
        self.check()

    def call_on_stop(self, action: Callable[[], None]) -> None:
        """Call `action` when there is a reason to stop, immediately if there already is one."""
        with self._lock:
            self._on_stop = action
            late = self._reason is not None
        if late:
            action()

    def _run(self) -> None:
        while not self._ended.wait(TICK_S):
            reason = self._find_reason()
            if reason is None:
                continue
            log.info("attempt stops", extra={"job": self._job.id, "reason": reason})
            with self._lock:
                self._reason = reason
                action = self._on_stop
            if action is not None:
                action()
            self._keep_lease_until_end()
            return

    def _find_reason(self) -> StopReason | None:
        now = time.monotonic()
        if self._shutdown.is_set():
            return StopReason.SHUTDOWN
        if now > self._deadline:
            return StopReason.DEADLINE
        try:
            return self._look(now)
        except RedisError as fault:
            log.warning("redis does not answer: %s", fault)
        # A lease that could not be renewed for its whole length has run out for everyone else.
        return StopReason.LEASE_LOST if time.monotonic() - self._renewed > self._lease_s else None

    def _look(self, now: float) -> StopReason | None:
        if now - self._renewed > self._lease_s / 3:
            if not self._store.renew(self._job.id, self._job.attempt, self._lease_s):
                return StopReason.LEASE_LOST
            self._renewed = now
        if now - self._looked < LOOK_S:
            return None
        self._looked = now
        try:
            job = self._store.load(self._job.id)
        except (NotFound, RecordUnreadable):  # a process of another version has taken it up
            return StopReason.LEASE_LOST
        if not is_executing(job, self._job.attempt):
            return StopReason.LEASE_LOST
        return StopReason.CANCELLED if job.state is JobState.CANCELLING else None

    def _keep_lease_until_end(self) -> None:
        """Stopping takes seconds: until the attempt has written its end, nobody else may take over."""
        while self._reason is not StopReason.LEASE_LOST and not self._ended.wait(self._lease_s / 3):
            try:
                if not self._store.renew(self._job.id, self._job.attempt, self._lease_s):
                    return
            except RedisError as fault:
                log.warning("redis does not answer: %s", fault)
