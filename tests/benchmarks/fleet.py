"""A fleet: three API processes behind a balancer, one Redis, 200 workers, jobs of 20 tenants.

python -m tests.benchmarks.fleet [--jobs 20000] [--kept 0] [--workers 200] [--minutes 20] [--json FILE]

An hour's arrivals in `--minutes`: one tenant sends a quarter of all jobs at once, three send theirs in two
bursts, the others as they come (Poisson). Each tenant's dashboard polls lists meanwhile, and Prometheus
scrapes each API. Real are the APIs, Redis, storage, janitors and the workers' code (`fleet_workers`); the
balancer passes bytes on; in place of an engine a job sleeps so long that the workers are in use to
`--load`. Costs are operations, bytes and processor seconds, which other programs of the machine change
little; waits are wall time and change with them. With `--kept` so many ended jobs and their artifacts are
recorded before, straight through the stores (`fleet_kept`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from redis import Redis

from app.core.access.api_keys import KeyStore, Scope, new_key
from app.core.jobs.job_store import JobStore
from app.core.records.job import TERMINAL
from app.core.redis.redis_server import connect, resolve_redis
from app.core.settings import Settings
from tests.benchmarks.fleet_kept import fill
from tests.benchmarks.fleet_measures import (
    all_jobs,
    costly_commands,
    fairness,
    share,
    stays_of,
    usage_of,
)
from tests.benchmarks.service import REPOSITORY, free_port, is_ready

MODEL = (REPOSITORY / "examples" / "wikitext-llama-6m").as_uri()
RECIPE = {"bits": 4, "group_size": 128}
APIS = 3
TENANTS = 20
PER_PROCESS = 50  # workers
ARRIVALS = 0.9  # of the minutes: the rest is for the jobs' ends
BURSTS = {0: (0.25, (0.02,)), 1: (0.05, (0.2, 0.6)), 2: (0.05, (0.3, 0.7)), 3: (0.05, (0.4, 0.8))}
GIVE_UP_S = 900.0


class Apis:
    """`nibble api`, several times over one Redis and one storage."""

    def __init__(self, folder: Path, redis_url: str, count: int, **settings: object) -> None:
        self.ports = [free_port() for _ in range(count)]
        self._log = (folder / "api.log").open("wb")
        more = {f"NIBBLE_{name.upper()}": str(value) for name, value in settings.items()}
        self._processes = []
        for number, port in enumerate(self.ports):
            environment = {
                **os.environ,
                "NIBBLE_STATE_DIR": str(folder / f"api-{number}"),
                "NIBBLE_STORAGE_URL": (folder / "storage").as_uri(),
                "NIBBLE_PORT": str(port),
                "NIBBLE_REDIS_URL": redis_url,
                "NIBBLE_BOOTSTRAP_API_KEY": "nib_benchmark_" + "0" * 32,
                "NIBBLE_MODEL_ROOTS": str(REPOSITORY / "examples"),
                "NIBBLE_LOG_LEVEL": "warning",
                **more,
            }
            command = [sys.executable, "-m", "app.cli", "api"]
            self._processes.append(
                subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=self._log, stderr=self._log)
            )
        for port in self.ports:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
                while not is_ready(client):
                    assert all(each.poll() is None for each in self._processes), (
                        folder / "api.log"
                    ).read_text()
                    time.sleep(0.1)

    @property
    def cpu_s(self) -> float:
        return sum(cpu_of(process.pid) for process in self._processes)

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()
        self._log.close()


def cpu_of(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def arrivals(jobs: int, seconds: float, seed: int = 0) -> dict[str, list[float]]:
    """By tenant: the moments at which its jobs are sent, in seconds."""
    draws = random.Random(seed)
    steady = 1 - sum(part for part, _ in BURSTS.values())
    moments: dict[str, list[float]] = {}
    for number in range(TENANTS):
        part, bursts = BURSTS.get(number, (steady / (TENANTS - len(BURSTS)), ()))
        count = max(1, round(jobs * part))
        drawn = [draws.choice(bursts) if bursts else draws.random() for _ in range(count)]
        moments[f"tenant-{number:02}"] = sorted(each * seconds for each in drawn)
    return moments


@contextmanager
def workers_of(redis_url: str, folder: Path, options: argparse.Namespace, service_s: float) -> Iterator[Any]:
    """The workers' processes."""
    processes = []
    for first in range(0, options.workers, PER_PROCESS):
        plan = {
            "redis_url": redis_url,
            "storage_url": (folder / "storage").as_uri(),
            "folder": str(folder / f"workers-{first}"),
            "queue_limit": options.jobs * 2,
            "service_s": service_s,
            "first": first,
            "count": min(PER_PROCESS, options.workers - first),
        }
        Path(str(plan["folder"])).mkdir()
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.fleet_workers"],
            cwd=REPOSITORY, stdin=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(json.dumps(plan) + "\n")
        process.stdin.flush()
        processes.append(process)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def tenant_keys(redis: Redis) -> dict[str, str]:
    store, keys = KeyStore(redis), {}
    for number in range(TENANTS):
        keys[f"tenant-{number:02}"] = new_key()
        store.register(
            keys[f"tenant-{number:02}"], tenant=f"tenant-{number:02}", scopes=frozenset({Scope.ADMIN})
        )
    return keys


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    seconds = options.minutes * 60 * ARRIVALS
    service_s = options.load * options.workers * seconds / options.jobs
    with ExitStack() as stack:
        server = stack.enter_context(resolve_redis(Settings(state_dir=folder / "redis")))
        redis = connect(server.url)
        assert server.pid is not None
        apis = Apis(folder, server.url, options.apis, queue_limit=options.jobs * 2)
        stack.callback(apis.stop)
        moments, keys = arrivals(options.jobs, seconds), tenant_keys(redis)
        kept = fill(redis, folder, list(keys), options.kept)
        workers = stack.enter_context(workers_of(server.url, folder, options, service_s))
        body = {"model": MODEL, "force": True, "formats": ["awq"], "recipe": RECIPE}
        plan = {
            "ports": apis.ports, "keys": keys, "arrivals": moments, "body": json.dumps(body),
            "poll_s": options.poll_s,
        }  # fmt: skip
        while len(redis.keys("nibble:worker:*")) < options.workers:
            time.sleep(0.2)

        def processors() -> dict[str, float]:
            pids = {"redis": [server.pid], "workers": [each.pid for each in workers]}
            used = {name: sum(map(cpu_of, each)) for name, each in pids.items()}
            return {"api": apis.cpu_s, **used}

        redis.config_resetstat()
        before, cpu, began = usage_of(redis), processors(), time.monotonic()
        called = call(plan, JobStore(redis), sum(len(each) for each in moments.values()))
        spent, after = usage_of(redis).since(before), processors()
        jobs = all_jobs(redis, keys, since=options.kept)
        rows = fairness(stays_of(jobs), options.workers)
        return {
            "jobs": len(jobs), "kept": kept, "workers": options.workers, "minutes": options.minutes,
            "service_s": service_s, "took_s": time.monotonic() - began,
            "states": {str(state): sum(job.state is state for job in jobs) for state in TERMINAL},
            "spent": spent._asdict(),
            "cpu_s": {name: after[name] - cpu[name] for name in cpu},
            "commands": costly_commands(redis),
            "called": called,
            "fairness": {name: row._asdict() for name, row in rows.items()},
        }  # fmt: skip


def call(plan: dict[str, Any], store: JobStore, jobs: int) -> dict[str, Any]:
    """What the callers saw, from the first submission until every job has ended and was followed up."""
    before = sum(store.counts().values())
    with subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.fleet_clients"],
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(plan) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == '{"submitted": true}\n'
        deadline = time.monotonic() + GIVE_UP_S
        while True:
            counts = store.counts()
            if sum(counts[state] for state in TERMINAL) == jobs + before and not store.unsettled():
                break
            assert time.monotonic() < deadline, f"jobs do not end: {counts}"
            time.sleep(1)
        process.stdin.write("\n")
        process.stdin.close()
        called: dict[str, Any] = json.loads(process.stdout.read())
        return called


def report(found: dict[str, Any]) -> None:
    jobs, spent = found["jobs"], found["spent"]
    print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores")
    print(
        f"{jobs} jobs of {found['service_s']:.1f} s, {found['workers']} workers, {found['took_s']:.0f} s; "
        f"{found['states']}"
    )
    if found["kept"]["jobs"]:
        print(f"beside {found['kept']}")
    print(
        f"Redis, per job: {spent['calls'] / jobs:.1f} operations, {spent['busy_s'] / jobs * 1e3:.3f} ms, "
        f"{spent['memory'] / jobs:.0f} bytes held, {spent['network'] / jobs:.0f} sent and received"
    )
    cpu = ", ".join(f"{name} {value / jobs * 1e3:.2f}" for name, value in found["cpu_s"].items())
    print(f"processor ms per job: {cpu}")
    commands = found["commands"].items()
    longest = ", ".join(f"{name} {calls / jobs:.2f}/job {busy:.2f} s" for name, (calls, busy) in commands)
    print(f"the longest commands: {longest}")
    for name, values in found["called"]["latencies"].items():
        print(f"  {name:10} {len(values):6} times, p50 {share(values, 0.5) * 1e3:7.1f} ms, "
              f"p99 {share(values, 0.99) * 1e3:7.1f} ms")  # fmt: skip
    print(f"  {found['called']['statuses']}")
    print("waits in s:  jobs    p50    p99   mean  fair's mean  ratio")
    for name, row in found["fairness"].items():
        print(f"  {name} {row['jobs']:6} {row['p50']:6.1f} {row['p99']:6.1f} {row['mean']:6.1f} "
              f"{row['fair_mean']:11.1f} {row['ratio']:6.2f}")  # fmt: skip
    print(f"largest ratio {max(row['ratio'] for row in found['fairness'].values()):.2f} of 3 allowed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--kept", type=int, default=0, help="ended jobs that are there before")
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--apis", type=int, default=APIS)
    parser.add_argument("--load", type=float, default=0.85, help="of the workers, on average")
    parser.add_argument("--poll-s", type=float, default=2.0, help="between two polls of one dashboard")
    parser.add_argument("--json", type=Path, help="the figures, for programs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    if options.json is not None:
        options.json.write_text(json.dumps(found))
    report(found)


if __name__ == "__main__":
    main()
