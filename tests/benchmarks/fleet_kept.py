"""Ended jobs in bulk for the fleet benchmark, and what reading and upkeep cost beside them.

python -m tests.benchmarks.fleet_kept [--kept 2000 20000 200000] [--records-only]

The records, events and manifests are what submissions and workers leave, written straight through the stores.
Each figure is of one call in this process, so operations and processor time are exact: the same code as in
the API, without HTTP.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self

from redis import Redis
from ulid import ULID

from app.core.access.limits import TenantLimits
from app.core.changes.redis_keys import (
    COUNTED,
    LABELLED,
    events_key,
    job_key,
    jobs_key,
    state_key,
    usage_key,
)
from app.core.jobs.job_encoding import encode
from app.core.jobs.job_queue import JobQueue
from app.core.jobs.job_store import JobFilter, JobStore
from app.core.jobs.label_index import label_keys
from app.core.records.artifact import ArtifactFile, ArtifactManifest
from app.core.records.ids import artifact_id
from app.core.records.job import Job, JobState, Problem, Progress, Stage
from app.core.records.specs import JobSpec
from app.core.redis.redis_server import connect, resolve_redis
from app.core.settings import Settings
from app.core.storage.artifact_store import ArtifactStore
from app.core.storage.object_store import ObjectStore
from app.core.storage.storage_keys import manifest_key
from app.core.storage.tags import Tags
from app.core.upkeep.garbage import GarbageCollector
from app.core.upkeep.janitor import Janitor
from tests.benchmarks.fleet_measures import cost_of, usage_of
from tests.benchmarks.service import REPOSITORY
from tests.outcomes import outcome_over

LABELS = {"team": "search"}
TENANTS = [f"tenant-{number:02}" for number in range(20)]
FAILED = 50  # one job of so many has failed
CHUNK = 500


def created_at(number: int, now: datetime) -> datetime:
    return now - timedelta(seconds=10 * (1_000_000 - number))


def kept_job(number: int, tenant: str, spec: JobSpec, began: datetime) -> Job:
    """A job that ended some time before `began`; they lie ten seconds apart."""
    created = created_at(number, began)
    job_id = f"job_{ULID.from_datetime(created)}"
    failed = number % FAILED == 0
    return Job(
        id=job_id, tenant=tenant, spec=spec, created_at=created, started_at=created,
        finished_at=created + timedelta(minutes=10), attempt=1, worker="w1", stage=Stage.PUBLISHING,
        state=JobState.FAILED if failed else JobState.SUCCEEDED,
        progress=Progress(fraction=1.0, layer=32, layers=32),
        artifacts=() if failed else (artifact_id(job_id, 0, "awq"),),
        error=Problem(code="out_of_memory", message="cuda:0 has 24 GB", remedy="x") if failed else None,
        fingerprint="0" * 64, contents="0" * 64,
    )  # fmt: skip


def manifest_of(job: Job) -> ArtifactManifest:
    return ArtifactManifest(
        id=job.artifacts[0], tenant=job.tenant, job=job.id, created_at=job.created_at, model=job.spec.model,
        model_digest="0" * 64, recipe=job.spec.recipes[0], format="awq", prefix="attempt-1",
        files=(ArtifactFile(path="config.json", size=2, sha256="0" * 64),),
    )  # fmt: skip


EVENTS = (
    *[{"kind": "stage", "payload": json.dumps({"stage": stage, "attempt": 1})} for stage in Stage],
    *[{"kind": "checkpoint", "payload": json.dumps({"key": f"layer-{n}", "attempt": 1})} for n in range(4)],
)


class Texts(NamedTuple):
    """A job's record and manifest as text, in which the next job's ids and tenant are put."""

    job: Job
    record: str
    manifest: str

    @classmethod
    def of(cls, job: Job) -> Self:
        manifest = manifest_of(job).model_dump_json() if job.artifacts else ""
        return cls(job, encode(job), manifest)

    def written(self, text: str, job_id: str, art_id: str, tenant: str) -> str:
        text = text.replace(self.job.id, job_id).replace(f'"{self.job.tenant}"', f'"{tenant}"')
        return text.replace(self.job.artifacts[0], art_id) if self.job.artifacts else text


def fill(
    redis: Redis, folder: Path, tenants: list[str], count: int, *, artifacts: bool = True
) -> dict[str, Any]:
    """Record `count` ended jobs of these tenants with their events and artifacts; what they take in Redis.

    The keys are those of the scripts of the job store, in pipelines; all records are one of two, with other
    ids.
    """
    client: Any = redis
    client.config_set("maxmemory", 0)  # the embedded server holds 1 GB
    client.config_set("appendonly", "no")  # until all is there
    storage, now = folder / "storage", datetime.now(UTC)
    model = (REPOSITORY / "examples" / "wikitext-llama-6m").as_uri()
    spec = JobSpec(model=model, formats=("awq",), labels=LABELS)
    kinds = [Texts.of(kept_job(number, "nobody", spec, now)) for number in (0, 1)]
    before, began = usage_of(redis), time.monotonic()
    for start in range(0, count, CHUNK):
        pipe = client.pipeline(transaction=False)
        for number in range(start, min(count, start + CHUNK)):
            tenant, texts = tenants[number % len(tenants)], kinds[min(1, number % FAILED)]
            job_id = f"job_{ULID.from_datetime(created_at(number, now))}"
            art_id = artifact_id(job_id, 0, "awq")
            record = texts.written(texts.record, job_id, art_id, tenant)
            pipe.hset(
                job_key(job_id), mapping={"record": record, "spec": spec.model_dump_json(), "version": 9}
            )
            pipe.zadd(jobs_key(tenant), {job_id: 0})
            for label in label_keys(tenant, LABELS):
                pipe.zadd(label, {job_id: 0})
            pipe.hincrby(LABELLED, tenant, 1)
            pipe.sadd(state_key(texts.job.state), job_id)
            for event in EVENTS:
                pipe.xadd(events_key(job_id), event)
            if texts.manifest and artifacts:
                path = storage / manifest_key(art_id)
                path.parent.mkdir(parents=True)
                path.write_text(texts.written(texts.manifest, job_id, art_id, tenant))
                pipe.hset(usage_key(tenant), art_id, 2)
        pipe.execute()
    client.set(COUNTED, 1)
    client.config_set("appendonly", "yes")
    held = usage_of(redis).since(before).memory
    return {
        "jobs": count, "bytes_each": round(held / count) if count else 0,
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


class Reader:
    """The service's reads and upkeep over these stores."""

    def __init__(self, redis: Redis, folder: Path) -> None:
        settings = Settings(state_dir=folder / "state", storage_url=(folder / "storage").as_uri())
        self._redis: Any = redis
        self._store, self._objects = JobStore(redis), ObjectStore(settings.object_store_url)
        self._limits = TenantLimits(redis, settings)
        queue = JobQueue(redis, limit=1000)
        outcome = outcome_over(redis, self._objects, settings)
        self._janitor = Janitor(self._store, queue, self._objects, outcome, max_attempts=3)
        kept = settings.model_copy(update={"retention_days": 36500})
        stores = (self._store, self._objects, self._limits, Tags(redis))
        self._collector = GarbageCollector(*stores, kept)
        self._artifacts = ArtifactStore(self._objects)

    def calls(self) -> dict[str, Callable[[], object]]:
        page = self._store.page
        return {
            "list": lambda: page("tenant-03", JobFilter(limit=25)),
            "list, failed": lambda: page("tenant-00", JobFilter(limit=25, state=JobState.FAILED)),
            "list, running": lambda: page("tenant-03", JobFilter(limit=25, state=JobState.RUNNING)),
            "list, a label": lambda: page("tenant-03", JobFilter(limit=25, labels=LABELS)),
            "list, a label that is nowhere": lambda: page("tenant-03", JobFilter(labels={"a": "b"})),
            "list, a label and failed": lambda: page(
                "tenant-03", JobFilter(limit=25, labels=LABELS, state=JobState.FAILED)
            ),
            "list, a label after an upgrade": self._page_without_index,
            "counts": lambda: self._store.counts_of("tenant-03"),
            "artifacts": self._page_of_artifacts,
            "artifacts, all looked through": lambda: self._artifacts.page("tenant-03", limit=25, after=None),
            "janitor's pass": self._janitor.sweep,
            "first collection": self._collector.collect,
            "next collection": self._collector.collect,
        }

    def _page_without_index(self) -> object:
        """The first search of a tenant whose jobs an earlier version recorded."""
        self._redis.hdel(LABELLED, "tenant-03")
        return self._store.page("tenant-03", JobFilter(labels={"a": "b"}))

    def _page_of_artifacts(self) -> object:
        only = self._limits.artifacts("tenant-03")
        return self._artifacts.page("tenant-03", limit=25, after=None, only=only)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kept", type=int, nargs="+", default=[2_000, 20_000, 200_000])
    parser.add_argument("--records-only", action="store_true", help="no artifacts: a file each")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for count in options.kept:
        with (
            tempfile.TemporaryDirectory() as name,
            resolve_redis(Settings(state_dir=Path(name) / "redis")) as server,
        ):
            redis = connect(server.url, timeout_s=60)
            row: dict[str, Any] = {
                "kept": fill(redis, Path(name), TENANTS, count, artifacts=not options.records_only)
            }
            for what, call in Reader(redis, Path(name)).calls().items():
                cost = cost_of(redis, call)
                row[what] = cost._asdict()
                print(
                    f"{count:7} {what:30} {cost.cpu_s * 1e3:10.1f} ms, Redis {cost.busy_s * 1e3:8.2f} ms, "
                    f"{cost.calls:7} operations",
                    flush=True,
                )
            print(row["kept"], flush=True)
            found.append(row)
            redis.close()
    if options.json is not None:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
