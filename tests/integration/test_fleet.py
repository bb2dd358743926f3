"""What a job costs does not grow with their number: operations and bytes of Redis, at N jobs and at 4 N.

The small form of `tests/benchmarks/fleet.py`: the same callers' requests, workers and janitor, one after the
other instead of side by side, so that only what is counted matters and not the time.
"""

from __future__ import annotations

import json
import threading
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from app.core.access.api_keys import Scope
from app.core.access.limits import TenantLimits
from app.core.records.job import JobState
from app.core.redis.redis_server import connect, resolve_redis
from app.core.settings import Settings
from app.core.storage.tags import Tags
from app.core.upkeep.garbage import GarbageCollector
from tests.benchmarks.fleet_clients import PAGES
from tests.benchmarks.fleet_measures import Usage, usage_of
from tests.benchmarks.fleet_workers import Fleet, stand_in
from tests.integration.api_service import ADMIN_KEY, EXAMPLES, MODEL, Service, running_service

TENANTS = 4
FEW = 24  # jobs
SHOWN = 5  # of each tenant's, on a page
ALLOWED = 1.2


class Costs(NamedTuple):
    """Of some jobs, by phase."""

    submit: Usage
    waiting_pass: Usage  # of the janitor, while all wait
    work: Usage
    ended_pass: Usage
    first_collection: Usage
    lists: Usage
    second_collection: Usage


def run(jobs: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Costs:
    monkeypatch.setattr("tests.benchmarks.fleet_workers.SleepingChild.service_s", 0.0)
    monkeypatch.setattr("workers.attempts.attempt.JobChild", None)  # put back at the end
    stand_in(0.0)
    with resolve_redis(Settings(state_dir=folder / "redis")) as server:
        settings = Settings(
            state_dir=folder / "api", redis_url=server.url, model_roots=(EXAMPLES,),
            bootstrap_api_key=ADMIN_KEY, janitor_interval_s=300, queue_limit=1000,
        )  # fmt: skip
        with running_service(settings) as service:
            return phases(jobs, folder, service, server.url)


def phases(jobs: int, folder: Path, service: Service, redis_url: str) -> Costs:
    keys = [service.key(Scope.ADMIN, tenant=f"tenant-{number}") for number in range(TENANTS)]
    clients = [service.client_with(key) for key in keys]
    settings = service.settings
    tags, limits = Tags(service.redis), TenantLimits(service.redis, settings)
    collector = GarbageCollector(service.store, service.objects, limits, tags, settings)
    body = json.dumps({"model": MODEL, "force": True, "formats": ["awq"]})
    fleet = Fleet(redis_url, settings.object_store_url, folder / "workers", 1000)
    (folder / "workers").mkdir()
    moments = [usage_of(service.redis)]

    def phase_ends() -> None:
        moments.append(usage_of(service.redis))

    for number in range(jobs):
        headers = {"Content-Type": "application/json"}
        answer = clients[number % TENANTS].post("/v1/jobs", content=body, headers=headers)
        assert answer.status_code == 202, answer.text
    phase_ends()
    service.janitor.sweep()
    phase_ends()
    worker = threading.Thread(target=lambda: fleet.work("w0", burst=True))
    worker.start()
    worker.join()
    assert service.store.counts()[JobState.SUCCEEDED] == jobs
    phase_ends()
    service.janitor.sweep()
    phase_ends()
    collector.collect()
    phase_ends()
    for client in clients:
        for path in PAGES.values():
            client.get(path.replace("limit=25", f"limit={SHOWN}")).raise_for_status()
        artifacts = client.get(f"/v1/artifacts?limit={SHOWN}").json()
        assert (len(artifacts["data"]), artifacts["has_more"]) == (SHOWN, True)
        client.close()
    phase_ends()
    collector.collect()
    phase_ends()
    return Costs(*(after.since(before) for before, after in pairwise(moments)))


def test_what_a_job_costs_does_not_grow_with_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "many").mkdir()
    # What a process does once (its first use of a script, the digests of the model) is no cost of a job.
    few = run(FEW, tmp_path / "few", monkeypatch)
    many = run(4 * FEW, tmp_path / "many", monkeypatch)
    for phase in ("submit", "work"):
        a_few, a_many = getattr(few, phase), getattr(many, phase)
        assert a_many.calls / 4 <= ALLOWED * a_few.calls, phase
        assert a_many.network / 4 <= ALLOWED * a_few.network, phase
    held = [costs.submit.memory + costs.work.memory for costs in (few, many)]
    assert held[1] / 4 <= ALLOWED * held[0]
    # A pass of the janitor reads each waiting record once; of jobs that ended it reads nothing.
    assert many.waiting_pass.calls <= 4 * FEW + 60
    assert many.ended_pass.calls <= few.ended_pass.calls + 10
    # A page costs the same whatever lies behind it, and the second collection looks at nothing again.
    assert many.lists.calls <= ALLOWED * few.lists.calls
    assert many.second_collection.calls <= few.second_collection.calls + 10


def test_the_janitor_reads_a_waiting_record_once(
    service: Service, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(6):
        service.submit(force=True)
    service.janitor.sweep()
    with connect(redis_url) as redis:
        before = usage_of(redis)
        service.janitor.sweep()
        first = usage_of(redis).since(before)
        for _ in range(12):
            service.submit(force=True)
        service.janitor.sweep()
        before = usage_of(redis)
        service.janitor.sweep()
        assert usage_of(redis).since(before).calls <= first.calls + 2
