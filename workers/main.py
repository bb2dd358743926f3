"""`python -m workers.main`: takes jobs from the queue, one at a time, for one device. Never imports torch."""

from __future__ import annotations

import argparse
import logging
import os
import re
import socket
import threading
from datetime import UTC, datetime

from redis import Redis

from app.core.access.hub_tokens import HubTokens
from app.core.access.limits import TenantLimits
from app.core.child.job_child import CHILD_MODULE
from app.core.deployments.deployment_store import DeploymentStore
from app.core.jobs.job_queue import JobQueue
from app.core.jobs.job_store import JobStore
from app.core.jobs.worker_registry import WorkerRecord
from app.core.planning.host_devices import DEVICE, gpu_names, has_gpu
from app.core.pushes.push_store import PushStore
from app.core.redis.redis_server import connect, resolve_redis, wait_for_redis
from app.core.settings import Settings, make_folder
from app.core.storage.object_store import ObjectStore
from app.core.storage.reuse import ReuseIndex
from app.core.telemetry.logs import refusals_logged, set_up_logs
from app.core.telemetry.tally import Tally
from app.core.telemetry.tracing import Destination, Tracer
from app.core.telemetry.version import package_version
from workers.attempts.context import WorkerContext
from workers.attempts.leftovers import Leftovers
from workers.devices.kept_profile import Measurement
from workers.queue_worker import QueueWorker
from workers.tasks import open_context

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nibble worker", description=__doc__)
    parser.add_argument("--device", type=device_name, default="auto", help="auto, cpu or cuda:N")
    parser.add_argument(
        "--name", type=worker_name, help="how the worker is listed; host, device and pid if absent"
    )
    parser.add_argument("--burst", action="store_true", help="end when the queues are empty")
    return parser.parse_args(arguments)


def device_name(text: str) -> str:
    if not DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu or cuda:N")
    return text


def worker_name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be up to 64 letters, digits and _.:-")
    return text


def resolve_device(setting: str) -> str:
    """The device for the setting: for `auto` the first GPU, if any, detected without torch."""
    if setting != "auto":
        return setting
    return "cuda:0" if has_gpu() else "cpu"


def describe_device(device: str) -> str:
    if device == "cpu":
        return f"{os.cpu_count()} CPU threads"
    names, index = gpu_names(), int(device.partition(":")[2])
    return names[index] if index < len(names) else device


def describe_worker(device: str, name: str | None) -> WorkerRecord:
    host, pid, now = socket.gethostname(), os.getpid(), datetime.now(UTC)
    return WorkerRecord(
        name=name or f"{host}-{device.replace(':', '')}-{pid}",
        host=host,
        pid=pid,
        device=device,
        device_name=describe_device(device),
        started_at=now,
        heartbeat_at=now,
    )


def serve(
    settings: Settings, redis_url: str, record: WorkerRecord, *, burst: bool, child_module: str = CHILD_MODULE
) -> None:
    """Work until a signal stops it, or, with `burst`, until the queues are empty.

    The device is measured meanwhile, unless the record has its profile.
    """
    shutdown = threading.Event()
    measurement = None
    if record.profile is None:
        measurement = Measurement(record.device, record.device_name, settings.scratch_dir)

    def context() -> WorkerContext:
        redis = connect(redis_url)
        objects = ObjectStore(settings.object_store_url)
        return WorkerContext(
            settings=settings,
            store=JobStore(redis),
            queue=JobQueue(redis, limit=settings.queue_limit),
            objects=objects,
            deployments=DeploymentStore(redis),
            name=record.name,
            device=record.device,
            shutdown=shutdown,
            reuse=ReuseIndex(redis, objects),
            limits=TenantLimits(redis, settings),
            pushes=PushStore(redis),
            hub_tokens=HubTokens(redis, settings),
            tally=Tally(redis),
            tracer=Tracer(Destination.of(settings, "nibble-worker", package_version())),
            profile=record.profile if measurement is None else measurement.profile,
            child_module=child_module,
        )

    open_context.set(context)
    redis: Redis = connect(redis_url, timeout_s=None)
    wait_for_redis(redis)
    leftovers = Leftovers(settings.scratch_dir, JobStore(redis))
    leftovers.remove()
    log.info("worker %s on %s (%s)", record.name, record.device, record.device_name)
    worker = QueueWorker(redis, record, shutdown, leftovers, measurement)
    worker.work(burst=burst, logging_level=settings.log_level.upper())
    if measurement is not None:
        measurement.pause()
    leftovers.remove()


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    settings = Settings()
    set_up_logs(settings)
    with refusals_logged(log):
        make_folder(settings.scratch_dir)
        with resolve_redis(settings) as server:
            record = describe_worker(resolve_device(options.device), options.name)
            serve(settings, server.url, record, burst=options.burst)


if __name__ == "__main__":
    main()
