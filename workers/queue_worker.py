"""Our additions to RQ's worker: an allow-list of tasks, heartbeats, and an orderly end.

The worker forks a process for each job ("horse") and never imports torch, so the fork is safe.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from redis import Redis
from redis.exceptions import RedisError
from rq.job import Job as Entry
from rq.worker import Worker

from app.core.child.start import die_with_parent
from app.core.errors import JobFault, NibbleError
from app.core.jobs.job_queue import QUEUE_NAMES, RUN_JOB_TASK, SERIALIZER
from app.core.jobs.job_store import JobStore
from app.core.jobs.worker_registry import WorkerRecord, WorkerRegistry
from workers.attempts.leftovers import Leftovers
from workers.devices.device_memory import device_memory
from workers.devices.kept_profile import Measurement

log = logging.getLogger(__name__)

WORKER_TTL_S = 60  # waits 45 s for an entry, then says that it lives
MONITORING_INTERVAL_S = 10
MAINTENANCE_INTERVAL_S = 30
HEARTBEAT_TTL_S = 75
LOOK_S = 1  # between two looks at the measurement of the device


class ListedEntry(Entry):
    """A queue entry that can name nothing but our task.

    JSON keeps pickles out, but an entry still names any importable function: whoever can write to Redis
    could otherwise run `os.system` here.
    """

    @property
    def func(self) -> Any:
        callbacks = (self._success_callback_name, self._failure_callback_name, self._stopped_callback_name)
        if self.func_name != RUN_JOB_TASK or self.instance is not None or any(callbacks):
            raise refuse_task(str(self.func_name))
        return super().func

    @property
    def success_callback(self) -> Any:
        return self._no_callback(self._success_callback_name)

    @property
    def failure_callback(self) -> Any:
        return self._no_callback(self._failure_callback_name)

    @property
    def stopped_callback(self) -> Any:
        return self._no_callback(self._stopped_callback_name)

    def _no_callback(self, name: str | None) -> None:
        if name is not None:
            log.error("entry %s names the callback %r; it is not called", self.id, name)


def refuse_task(name: str) -> JobFault:
    return JobFault(
        f"the queue names the task {name[:200]!r}; only {RUN_JOB_TASK} may run",
        code="task_refused",
        remedy="find out who else writes to this Redis",
    )


class QueueWorker(Worker):
    """Takes entries from our queues. `shutdown` is set in the horse when this worker must stop."""

    def __init__(
        self,
        redis: Redis,
        record: WorkerRecord,
        shutdown: threading.Event,
        leftovers: Leftovers,
        measurement: Measurement | None = None,
    ) -> None:
        super().__init__(
            list(QUEUE_NAMES),
            # RQ keeps a killed worker's name for two minutes; ours may be used again at once.
            name=f"{record.name}.{uuid4().hex[:8]}",
            connection=redis,
            job_class=ListedEntry,
            serializer=SERIALIZER,
            worker_ttl=WORKER_TTL_S,
            job_monitoring_interval=MONITORING_INTERVAL_S,
            maintenance_interval=MAINTENANCE_INTERVAL_S,
        )
        self._record = record
        self._shutdown_flag = shutdown
        self._leftovers = leftovers
        self._measurement = measurement
        self._registry = WorkerRegistry(redis)
        self._jobs = JobStore(redis)

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        super().heartbeat(timeout, pipeline=pipeline)
        self._beat()

    def dequeue_job_and_maintain_ttl(self, timeout: int | None, max_idle_time: int | None = None) -> Any:
        """The next entry. While none waits the device is measured; an entry stops that at once."""
        measurement = self._measurement
        while timeout is not None and measurement is not None and not measurement.is_over:
            entry = super().dequeue_job_and_maintain_ttl(LOOK_S, LOOK_S)
            if entry is not None or self._stop_requested:
                measurement.pause()
                return entry
            measurement.go_on()
        return super().dequeue_job_and_maintain_ttl(timeout, max_idle_time)

    def run_maintenance_tasks(self) -> None:
        super().run_maintenance_tasks()  # type: ignore[no-untyped-call]
        # A killed horse leaves its folder, and no attempt follows on this host if the job was cancelled.
        self._leftovers.remove()

    def register_birth(self) -> None:
        super().register_birth()  # type: ignore[no-untyped-call]
        self._beat()

    def register_death(self) -> None:
        super().register_death()  # type: ignore[no-untyped-call]
        self._registry.remove(self._record.name)

    def execute_job(self, job: Any, queue: Any) -> None:
        job_id = str(job.args[0]) if job.args else ""
        with contextlib.suppress(NibbleError):
            self._beat(job=job_id, tenant=self._jobs.load(job_id).tenant)
        try:
            super().execute_job(job, queue)
        finally:
            self._beat(job=None, tenant=None)

    def _shutdown(self) -> None:
        # Also when it raises in an idle worker: who is interrupted may swallow that.
        self._stop_requested = True
        super()._shutdown()  # type: ignore[no-untyped-call]

    def maintain_heartbeats(self, job: Any, execution: Any) -> None:
        if self._stop_requested:  # a horse that was just being forked when the signal came has not heard it
            self.handle_warm_shutdown_request()
        try:
            super().maintain_heartbeats(job, execution)
        except RedisError as fault:
            # The job goes on without Redis for as long as its lease lasts; so must this process.
            log.warning("redis does not answer: %s", fault)

    def main_work_horse(self, job: Any, queue: Any) -> None:
        # Otherwise a killed worker leaves a horse that computes on, beside its successor.
        die_with_parent(self._record.pid)
        super().main_work_horse(job, queue)

    def setup_work_horse_signals(self) -> None:
        super().setup_work_horse_signals()  # type: ignore[no-untyped-call]
        signal.signal(signal.SIGTERM, lambda *_: self._shutdown_flag.set())

    def handle_warm_shutdown_request(self) -> None:
        """Have the running job given back to the queue: it goes on elsewhere from its checkpoints."""
        if self.horse_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.horse_pid, signal.SIGTERM)

    def _beat(self, **changes: object) -> None:
        memory = device_memory(self._record.device)
        beat: dict[str, object] = {
            "heartbeat_at": datetime.now(UTC), "memory_bytes": memory.used, "memory_total": memory.total,
        }  # fmt: skip
        if self._measurement is not None:
            beat |= {"profile": self._measurement.profile, "measuring": self._measurement.is_running}
        self._record = self._record.model_copy(update={**changes, **beat})
        try:
            self._registry.beat(self._record, ttl_s=HEARTBEAT_TTL_S)
        except RedisError as fault:
            log.warning("heartbeat not sent: %s", fault)
