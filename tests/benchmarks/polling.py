"""A thousand dashboards that poll with entity tags: latency, processor time and memory of the API.

python -m tests.benchmarks.polling [--minutes 10] [--rate 500] [--clients 1000] [--flood 200 1000]
                                   [--only probes]

Open loop: request n is due at n / rate whether or not its predecessors were answered, and its latency counts
from that moment, so an API that halts is charged for everything that would have been asked meanwhile
(coordinated omission). Each client is a browser's session with a connection and entity tags of its own. It
shows one page for a while, then another: the tenant's jobs, one of its running jobs, the workers, the
deployments. Meanwhile a writer does what workers do: progress every second of the jobs of three in ten
tenants, jobs that end and begin, heartbeats. Valkey, API, writer and clients are processes of their own.
Then floods of kept connections ask without a pause, and new ones come beside them (`polling_newcomers`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from app.core.access.api_keys import KeyStore, Scope, new_key
from app.core.access.login import LoginLinks
from app.core.deployments.deployment import DeploymentSpec, Replica, ReplicaState
from app.core.deployments.deployment_store import DeploymentStore
from app.core.jobs.job_store import JobStore
from app.core.jobs.worker_registry import WorkerRecord, WorkerRegistry
from app.core.records.ids import new_id
from app.core.records.job import Job, JobState, Progress, transition
from app.core.records.specs import JobSpec
from app.core.redis.redis_server import connect, resolve_redis
from app.core.settings import Settings
from tests.benchmarks import polling_newcomers
from tests.benchmarks.polling_clients import WARM_UP_S
from tests.benchmarks.service import free_port, is_ready

REPOSITORY = Path(__file__).resolve().parents[2]
TENANTS = 10
BUSY = 3  # tenants whose jobs progress
JOBS = 30  # of each tenant
RUNNING = 2  # of them
WORKERS = 4
PROGRESS_S = 1.0
BEAT_S = 10.0
REPLICA_BEAT_S = 2.0
TURNOVER_S = 15.0  # how often a job of a tenant ends and another one begins
LEASE_S = 600.0
FLOOD_S = 12.0
PERCENTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}


class Tenant:
    """A tenant's jobs, and what its workers do with them."""

    def __init__(self, name: str, jobs: JobStore, deployments: DeploymentStore) -> None:
        self.name = name
        self.running: list[str] = []
        self._jobs = jobs
        self._layer = 0
        self._deployments = deployments
        for number in range(JOBS):
            job = self.submit()
            if number >= JOBS - RUNNING:
                self.begin(job)
            else:
                self.end(self.begin(job))
        spec = DeploymentSpec(artifact=new_id("art"), name="chat")
        self._deployment = deployments.create(name, spec)

    def submit(self) -> Job:
        spec = JobSpec(model=(REPOSITORY / "examples" / "wikitext-llama-6m").as_uri())
        job = Job(id=new_id("job"), tenant=self.name, spec=spec, created_at=datetime.now(UTC))
        self._jobs.create(job)
        return job

    def begin(self, job: Job) -> Job:
        self.running.append(job.id)
        return self._jobs.claim(job.id, 1, worker="w", lease_s=LEASE_S)

    def end(self, job: Job) -> None:
        self.running.remove(job.id)
        self._jobs.update(job.id, lambda seen: transition(seen, JobState.SUCCEEDED), attempt=1)

    def progress(self) -> None:
        self._layer += 1
        told = Progress(fraction=self._layer % 1000 / 1000, layer=self._layer, layers=1000)
        for job_id in self.running:
            self._jobs.update(job_id, lambda job: job.model_copy(update={"progress": told}), attempt=1)

    def turn_over(self) -> None:
        """The older running job ends, a new one takes its place; the other goes on."""
        self.end(self._jobs.load(self.running[0]))
        self.begin(self.submit())

    def beat(self) -> None:
        replica = Replica(
            deployment=self._deployment.id, slot=0, owner=self.name, worker="s", engine="transformers",
            state=ReplicaState.READY, url="http://127.0.0.1:9", running=self._layer // 8 % 4,
            since=self._deployment.created_at,
        )  # fmt: skip
        self._deployments.beat(replica, ttl_s=30)


class Writer(threading.Thread):
    """What the workers of all tenants write, evenly spread over time."""

    def __init__(self, tenants: list[Tenant], registry: WorkerRegistry) -> None:
        super().__init__(daemon=True)
        self._tenants = tenants
        self._registry = registry
        self._began = datetime.now(UTC)
        self._ended = threading.Event()
        self._beat_workers()

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        step = PROGRESS_S / len(self._tenants)
        round_s = time.monotonic()
        due = dict.fromkeys(("workers", "replicas", "turnover"), 0.0)
        for number in range(sys.maxsize):
            tenant = self._tenants[number % len(self._tenants)]
            if number % len(self._tenants) < BUSY:
                tenant.progress()
            now = time.monotonic()
            if now >= due["workers"]:
                due["workers"] = now + BEAT_S
                self._beat_workers()
            if now >= due["replicas"]:
                due["replicas"] = now + REPLICA_BEAT_S / len(self._tenants)
                tenant.beat()
            if now >= due["turnover"]:
                due["turnover"] = now + TURNOVER_S / len(self._tenants)
                tenant.turn_over()
            if self._ended.wait(max(0.0, round_s + (number + 1) * step - now)):
                return

    def _beat_workers(self) -> None:
        for number in range(WORKERS):
            record = WorkerRecord(
                name=f"w{number}", host="h", pid=1, device=f"cuda:{number}", job=self._tenants[0].running[0],
                tenant=self._tenants[0].name, started_at=self._began, heartbeat_at=datetime.now(UTC),
            )  # fmt: skip
            self._registry.beat(record, ttl_s=75)


class Api:
    """`nibble api` as a process."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        self.port, self.probe_port = free_port(), free_port()
        environment = {
            **os.environ,
            "NIBBLE_STATE_DIR": str(folder / "state"),
            "NIBBLE_PORT": str(self.port),
            "NIBBLE_PROBE_PORT": str(self.probe_port),
            "NIBBLE_REDIS_URL": redis_url,
            "NIBBLE_BOOTSTRAP_API_KEY": "nib_benchmark_" + "0" * 32,
        }
        command = [sys.executable, "-m", "app.cli", "api"]
        self._log = (folder / "api.log").open("wb")
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=self._log, stderr=self._log
        )
        self._seen = psutil.Process(self.process.pid)
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False) as client:
            while not is_ready(client):
                assert self.process.poll() is None, (folder / "api.log").read_text()
                time.sleep(0.05)

    @property
    def cpu_s(self) -> float:
        times = self._seen.cpu_times()
        return float(times.user + times.system)

    @property
    def resident_mib(self) -> float:
        return float(self._seen.memory_info().rss / 2**20)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
        self._log.close()


def session_plan(tenants: list[Tenant], redis: Any, count: int) -> list[tuple[str, list[str]]]:
    """A cookie and the paths of each client. Each tenant's people hold a key of their own."""
    keys, logins, clients = KeyStore(redis), LoginLinks(redis), []
    for number in range(count):
        tenant = tenants[number % len(tenants)]
        scopes = frozenset({Scope.JOBS_READ, Scope.DEPLOYMENTS_READ})
        record = keys.register(new_key(), tenant=tenant.name, scopes=scopes)
        session = logins.open_session(record.id)
        job_id = tenant.running[-1 - number // len(tenants) % RUNNING]
        paths = ["/v1/jobs?limit=25&view=brief", f"/v1/jobs/{job_id}", "/v1/workers", "/v1/deployments"]
        clients.append((f"nibble_session={session}", paths))
    return clients


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    with resolve_redis(Settings(state_dir=folder / "redis")) as server:
        redis = connect(server.url)
        jobs, deployments = JobStore(redis), DeploymentStore(redis)
        tenants = [Tenant(f"tenant-{number}", jobs, deployments) for number in range(TENANTS)]
        writer = Writer(tenants, WorkerRegistry(redis))
        api = Api(folder, server.url)
        seconds = arguments.minutes * 60
        clients = session_plan(tenants, redis, arguments.clients)
        plan = {"clients": clients, "rate": arguments.rate, "port": api.port, "seconds": seconds}
        writer.start()
        command = [sys.executable, "-m", "tests.benchmarks.polling_clients"]
        if arguments.only != "probes":
            with subprocess.Popen(
                command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as generator:
                report(arguments, watch(api, generator, plan))
        for connections in arguments.flood:
            polling_newcomers.report(api.port, api.probe_port, clients[0], connections, FLOOD_S)
        writer.stop()
        api.stop()
        redis.close()


def watch(api: Api, generator: subprocess.Popen[str], plan: dict[str, Any]) -> dict[str, Any]:
    """What the clients saw, with the API's memory and processor time meanwhile."""
    assert generator.stdin is not None
    assert generator.stdout is not None
    generator.stdin.write(json.dumps(plan))
    generator.stdin.close()
    idle_mib = api.resident_mib
    time.sleep(WARM_UP_S + len(plan["clients"]) / 2000)
    began, before = time.monotonic(), api.cpu_s
    memory = [api.resident_mib]
    step = min(60.0, plan["seconds"] / 6)
    while time.monotonic() - began < plan["seconds"] - step / 2:
        time.sleep(step)
        memory.append(api.resident_mib)
    used, passed = api.cpu_s - before, time.monotonic() - began
    found: dict[str, Any] = json.loads(generator.stdout.read())
    asked = found["asked"] * passed / plan["seconds"]
    return {**found, "idle_mib": idle_mib, "memory": memory, "step": step, "cpu_ms": used / asked * 1e3,
            "cores": used / passed}  # fmt: skip


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3


def report(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    latencies, statuses = found["latencies"], Counter(found["statuses"])
    answered = sum(statuses.values())
    unchanged = sum(count for name, count in statuses.items() if name.endswith(" 304"))
    print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores")
    print(f"{arguments.clients} clients, {arguments.rate} requests/s for {arguments.minutes:g} min: "
          f"{answered} of {found['asked']} answered, {found['broken']} broken")  # fmt: skip
    told = ", ".join(f"{name} {percentile(latencies, share):.1f} ms" for name, share in PERCENTILES.items())
    print(f"latency from when due: {told}, max {max(latencies) * 1e3:.1f} ms")
    for route, values in found["by_route"].items():
        own = {name.rsplit(maxsplit=1)[1]: n for name, n in statuses.items() if name.startswith(f"{route} ")}
        print(f"  {route:12} p50 {percentile(values, 0.5):6.1f}  p99 {percentile(values, 0.99):6.1f}  {own}")
    print(f"304: {unchanged / answered:.1%}; {found['bytes'] / answered:.0f} bytes an answer")
    print(f"API: {found['cpu_ms']:.3f} ms of processor time a request, {found['cores']:.2f} cores; "
          f"clients: {found['own_cpu_s'] / found['asked'] * 1e3:.3f} ms a request")  # fmt: skip
    memory = " ".join(f"{mib:.1f}" for mib in found["memory"])
    print(f"resident MiB: idle {found['idle_mib']:.1f}; every {found['step']:g} s {memory}; "
          f"last / first {found['memory'][-1] / found['memory'][0]:.3f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=500.0)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--flood", type=int, nargs="*", default=[200, 1000], metavar="CONNECTIONS")
    parser.add_argument("--only", choices=["probes"], help="leave out the polls, measure the floods alone")
    with tempfile.TemporaryDirectory() as folder:
        measure(parser.parse_args(), Path(folder))


if __name__ == "__main__":
    main()
