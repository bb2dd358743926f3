"""Workers of the fleet benchmark: threads of a process, each a real queue worker without an engine.

Queue, leases, heartbeats, events, checkpoints, publication and what follows from the end are the product's
own. Two things differ from `nibble worker`: an attempt runs in the worker's thread instead of a fork, and
its child is a generator that sleeps where an engine would compute.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from redis import Redis

import workers.attempts.attempt
from app.core.access.hub_tokens import HubTokens
from app.core.access.limits import TenantLimits
from app.core.child.assignment import (
    CHECKPOINTS,
    OUTPUT,
    Assignment,
    Checkpointed,
    Finished,
    OutputFolder,
    Progressed,
    ProgressMessage,
    StageStarted,
)
from app.core.deployments.deployment_store import DeploymentStore
from app.core.jobs.job_queue import JobQueue
from app.core.jobs.job_store import JobStore
from app.core.jobs.worker_registry import WorkerRecord
from app.core.planning.device_profile import NOMINAL
from app.core.pushes.push_store import PushStore
from app.core.records.job import Stage
from app.core.redis.redis_server import connect
from app.core.settings import Settings
from app.core.storage.object_store import ObjectStore
from app.core.storage.reuse import ReuseIndex
from app.core.telemetry.tally import Tally
from app.core.telemetry.tracing import Destination, Tracer
from workers.attempts.context import WorkerContext
from workers.attempts.leftovers import Leftovers
from workers.queue_worker import QueueWorker
from workers.tasks import open_context

LAYERS = 4
STAGES = (Stage.CALIBRATING, Stage.SEARCHING, Stage.PACKING, Stage.EVALUATING)


class SleepingChild:
    """Stands in for the job's process: its messages and files, and sleep where it computes."""

    service_s = 0.0  # seconds of each job
    pid = os.getpid()

    def __init__(self, assignment: Assignment, *, module: str) -> None:
        self._assignment = assignment

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        """Nothing is open."""

    def stop(self, grace_s: float) -> None:
        """It ends by itself within seconds."""

    def messages(self, on_wait: object) -> Iterator[ProgressMessage]:
        folder = self._assignment.work_folder
        for layer, stage in enumerate(STAGES):
            yield StageStarted(stage=stage)
            time.sleep(self.service_s / LAYERS)
            (folder / CHECKPOINTS / f"layer-{layer}").write_bytes(b"x" * 64)
            yield Checkpointed(key=f"layer-{layer}")
            yield Progressed(fraction=(layer + 1) / LAYERS, layer=layer + 1, layers=LAYERS)
        outputs = []
        for name in self._assignment.spec.formats:
            output = folder / OUTPUT / name
            output.mkdir(parents=True)
            (output / "config.json").write_text("{}")
            outputs.append(
                OutputFolder(recipe_index=0, format=name, folder=f"{OUTPUT}/{name}", summary={"bits": 4})
            )
        (folder / "report.json").write_text("{}")
        yield Finished(report="report.json", outputs=tuple(outputs))


class NoLimit:
    """RQ's limit of an attempt's time works by signals, which threads don't get."""

    def __init__(self, *_: object, **__: object) -> None:
        """The watch of the attempt ends it in time."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *fault: object) -> None:
        return None


class ThreadWorker(QueueWorker):
    """A queue worker whose attempts run in its own thread."""

    death_penalty_class: Any = NoLimit

    def _install_signal_handlers(self) -> None:
        """Only the main thread of a process may."""

    def subscribe(self) -> None:
        """Commands from outside are not part of what is measured, and would be a thread each."""
        self.pubsub_thread = None

    def fork_work_horse(self, job: Any, queue: Any) -> None:
        self.perform_job(job, queue, self.execution)

    def monitor_work_horse(self, job: Any, queue: Any, execution: Any) -> None:
        self.executions.pop(execution.id, None)


class Fleet(NamedTuple):
    """What the workers of one process share."""

    redis_url: str
    storage_url: str
    folder: Path
    queue_limit: int

    def settings(self, name: str) -> Settings:
        """A state folder for each worker, as workers on hosts of their own have; one cache of models."""
        state = self.folder / name
        (state / "work").mkdir(parents=True, exist_ok=True)
        cache = self.folder / "cache"
        cache.mkdir(exist_ok=True)
        if not (state / "cache").is_symlink():
            (state / "cache").symlink_to(cache)
        return Settings(
            state_dir=state, redis_url=self.redis_url, storage_url=self.storage_url,
            model_roots=(Path("/"),), queue_limit=self.queue_limit,
        )  # fmt: skip

    def context(self, name: str, settings: Settings, redis: Redis) -> WorkerContext:
        objects = ObjectStore(settings.object_store_url)
        return WorkerContext(
            settings=settings,
            store=JobStore(redis),
            queue=JobQueue(redis, limit=settings.queue_limit),
            objects=objects,
            deployments=DeploymentStore(redis),
            name=name,
            device="cpu",
            shutdown=threading.Event(),
            reuse=ReuseIndex(redis, objects),
            limits=TenantLimits(redis, settings),
            pushes=PushStore(redis),
            hub_tokens=HubTokens(redis, settings),
            tally=Tally(redis),
            tracer=Tracer(Destination(None, "fleet")),
            profile=NOMINAL["cpu"].model_copy(update={"assumed": ()}),
        )

    def work(self, name: str, *, burst: bool = False) -> None:
        """Take jobs for ever, or until none waits; called in the worker's thread."""
        settings = self.settings(name)
        redis = connect(self.redis_url)  # a real worker's fork connects anew for each job
        open_context.set(lambda: self.context(name, settings, redis))
        now = datetime.now(UTC)
        record = WorkerRecord(
            name=name, host="fleet", pid=os.getpid(), device="cpu", started_at=now, heartbeat_at=now
        )
        queue_redis = connect(self.redis_url, timeout_s=None)
        leftovers = Leftovers(settings.scratch_dir, JobStore(redis))
        worker = ThreadWorker(queue_redis, record, threading.Event(), leftovers)
        worker.work(burst=burst, logging_level="WARNING")
        queue_redis.close()
        redis.close()


def stand_in(service_s: float) -> None:
    """From now on attempts of this process sleep `service_s` seconds instead of starting a child."""
    SleepingChild.service_s = service_s
    vars(workers.attempts.attempt)["JobChild"] = SleepingChild


def main() -> None:
    """The plan comes on stdin; a closed stdin ends the process."""
    plan = json.loads(sys.stdin.readline())
    logging.basicConfig(level="WARNING")
    threading.stack_size(512 * 1024)
    stand_in(plan["service_s"])
    fleet = Fleet(plan["redis_url"], plan["storage_url"], Path(plan["folder"]), plan["queue_limit"])
    for number in range(plan["first"], plan["first"] + plan["count"]):
        threading.Thread(target=fleet.work, args=(f"w{number}",), daemon=True).start()
        time.sleep(0.02)
    sys.stdin.read()
    os._exit(0)  # threads that wait for an entry don't hear anything else


if __name__ == "__main__":
    main()
