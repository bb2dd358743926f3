"""A worker's surroundings for tests: stores, a queue, jobs for the bundled model, real worker processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from redis import Redis

from app.core.access.hub_tokens import HubTokens
from app.core.access.limits import TenantLimits
from app.core.deployments.deployment_store import DeploymentStore
from app.core.formats.registry import FormatName
from app.core.jobs.job_queue import JobQueue
from app.core.jobs.job_store import JobStore
from app.core.planning.device_profile import NOMINAL
from app.core.pushes.push_store import PushStore
from app.core.records.artifact import ArtifactManifest
from app.core.records.ids import artifact_id, new_id
from app.core.records.job import Job
from app.core.records.specs import JobSpec
from app.core.settings import Settings
from app.core.storage.object_store import ObjectStore
from app.core.storage.published import read_manifest
from app.core.storage.reuse import ReuseIndex
from app.core.telemetry.tally import Tally
from app.core.telemetry.tracing import Destination, Tracer
from app.core.telemetry.version import package_version
from app.core.upkeep.janitor import Janitor
from workers.attempts.attempt import run_attempt
from workers.attempts.context import WorkerContext

STAND_IN = "tests.integration.stand_in_child"
REPOSITORY = Path(__file__).parents[2]
MODEL = (REPOSITORY / "examples" / "wikitext-llama-6m").as_uri()


class Workshop:
    """Everything around a supervisor, over a real Valkey and a folder as object storage."""

    def __init__(self, redis: Redis, redis_url: str, folder: Path, **changes: object) -> None:
        defaults: dict[str, object] = {
            "state_dir": folder,
            "redis_url": redis_url,
            "model_roots": (REPOSITORY / "examples",),
            "lease_s": 3,
            "cancel_grace_s": 1,
        }
        self.settings = Settings.model_validate({**defaults, **changes})
        self.redis = redis
        self.store = JobStore(redis)
        self.queue = JobQueue(redis, limit=100)
        self.objects = ObjectStore(self.settings.object_store_url)
        self.deployments = DeploymentStore(redis)
        self.shutdown = threading.Event()
        self.settings.scratch_dir.mkdir(parents=True)

    def submit(self, *, timeout_s: int = 60, model: str = MODEL, **labels: str) -> Job:
        return self.record(JobSpec(model=model, labels=labels, timeout_s=timeout_s, force=True))

    def record(self, spec: JobSpec) -> Job:
        job = Job(id=new_id("job"), tenant="default", spec=spec, created_at=datetime.now(UTC))
        assert self.store.create(job)
        return job

    def context(self) -> WorkerContext:
        return WorkerContext(
            settings=self.settings,
            store=self.store,
            queue=self.queue,
            objects=self.objects,
            deployments=self.deployments,
            name="test",
            device="cpu",
            shutdown=self.shutdown,
            reuse=ReuseIndex(self.redis, self.objects),
            limits=TenantLimits(self.redis, self.settings),
            pushes=PushStore(self.redis),
            hub_tokens=HubTokens(self.redis, self.settings),
            tally=Tally(self.redis),
            tracer=Tracer(Destination.of(self.settings, "nibble-worker", package_version())),
            profile=NOMINAL["cpu"].model_copy(update={"assumed": ()}),
            child_module=STAND_IN,
        )

    def run(self, job: Job, attempt: int = 1) -> Job:
        run_attempt(self.context(), job.id, attempt)
        return self.store.load(job.id)

    def sweep(self) -> None:
        """One pass of the janitor."""
        Janitor(self.store, self.queue, self.objects, self.context().outcome, max_attempts=3).sweep()

    def kinds(self, job: Job) -> list[str]:
        return [event.kind for event in self.store.events(job.id, limit=1000)]

    def payload(self, job: Job, kind: str) -> dict[str, object]:
        return next(event.payload for event in self.store.events(job.id) if event.kind == kind)

    def manifest(self, job: Job, name: FormatName = "compressed-tensors") -> ArtifactManifest | None:
        return read_manifest(self.objects, artifact_id(job.id, 0, name))

    @contextmanager
    def worker(self, name: str, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker process in a process group of its own."""
        settings = self.settings
        environment = {
            **os.environ,
            "NIBBLE_STATE_DIR": str(settings.state_dir),
            "NIBBLE_REDIS_URL": str(settings.redis_url),
            "NIBBLE_MODEL_ROOTS": str(settings.model_roots[0]),
            "NIBBLE_LEASE_S": str(settings.lease_s),
            "NIBBLE_CANCEL_GRACE_S": str(settings.cancel_grace_s),
        }
        started = command or ("-m", "tests.integration.stand_in_worker", name)
        with (
            (settings.state_dir / f"{name}.log").open("ab") as log,
            subprocess.Popen(
                [sys.executable, *started],
                env=environment,
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                start_new_session=True,
            ) as process,
        ):
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()

    def log_of(self, name: str) -> str:
        return (self.settings.state_dir / f"{name}.log").read_text()


def processes_with(word: str) -> list[int]:
    """Ids of processes whose command line or environment holds `word`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                text = (folder / "environ").read_bytes()
            except OSError:
                continue
            if word.encode() in text:
                found.append(int(folder.name))
    return found
