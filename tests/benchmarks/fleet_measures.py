"""What the fleet benchmark reads from Redis and processes, and what follows from it."""

from __future__ import annotations

import heapq
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from redis import Redis

from app.core.jobs.job_encoding import decode
from app.core.records.job import Job

FLOOR_S = 1.0  # a wait below it counts as this long: the dispatch itself takes some tenths on a busy machine
BLOCKING = ("blpop", "brpop", "blmove")  # counted, but their time is waiting


class Usage(NamedTuple):
    """What Redis has done and holds at one moment."""

    calls: int  # commands, those of scripts included
    busy_s: float  # the time that they took
    memory: int  # bytes of keys and values
    network: int  # bytes received and sent

    def since(self, before: Usage) -> Usage:
        return Usage(*(now - then for now, then in zip(self, before, strict=True)))


def commands_of(redis: Redis) -> dict[str, dict[str, float]]:
    """By command, those inside of scripts too: calls, and microseconds in all."""
    client: Any = redis  # Any: redis-py types each answer as possibly awaitable
    return {name.removeprefix("cmdstat_"): each for name, each in client.info("commandstats").items()}


def usage_of(redis: Redis) -> Usage:
    client: Any = redis
    commands = commands_of(redis)
    memory, stats = client.info("memory"), client.info("stats")
    return Usage(
        calls=int(sum(each["calls"] for each in commands.values())),
        busy_s=sum(each["usec"] for name, each in commands.items() if name not in BLOCKING) / 1e6,
        memory=memory["used_memory_dataset"],
        network=stats["total_net_input_bytes"] + stats["total_net_output_bytes"],
    )


def costly_commands(redis: Redis, most: int = 12) -> dict[str, list[float]]:
    """By command: calls and seconds, the longest first."""
    rows = {name: [each["calls"], each["usec"] / 1e6] for name, each in commands_of(redis).items()}
    return dict(sorted(rows.items(), key=lambda row: -row[1][1])[:most])


def all_jobs(redis: Redis, tenants: Collection[str], *, since: int = 0) -> list[Job]:
    """The records of these tenants but the oldest `since`, which are spread evenly over them."""
    client: Any = redis
    jobs = []
    for number, tenant in enumerate(tenants):
        first = len(range(number, since, len(tenants)))
        ids = client.zrange(f"nibble:jobs:{tenant}", first, -1)
        for start in range(0, len(ids), 500):
            pipe = client.pipeline(transaction=False)
            for job_id in ids[start : start + 500]:
                pipe.hmget(f"nibble:job:{job_id.decode()}", "record", "spec")
            jobs += [decode(record, spec) for record, spec in pipe.execute()]
    return jobs


class Stay(NamedTuple):
    """A job's time in the service; seconds since the first one came."""

    tenant: str
    came: float
    began: float
    took: float

    @property
    def waited(self) -> float:
        return self.began - self.came


def stays_of(jobs: Sequence[Job]) -> list[Stay]:
    first = min(job.created_at for job in jobs)
    stays = []
    for job in jobs:
        assert job.started_at is not None, job.id
        assert job.finished_at is not None, job.id
        began = (job.started_at - first).total_seconds()
        stays.append(
            Stay(
                tenant=job.tenant,
                came=(job.created_at - first).total_seconds(),
                began=began,
                took=(job.finished_at - first).total_seconds() - began,
            )
        )
    return sorted(stays, key=lambda stay: stay.came)


def fair_waits(stays: Sequence[Stay], workers: int) -> dict[str, list[float]]:
    """The same jobs under fair queueing: what each would have waited, by tenant.

    A free worker takes the oldest job of the tenant whose turn it is; handing a job over takes no time.
    """
    waits: dict[str, list[float]] = defaultdict(list)
    lines: dict[str, deque[Stay]] = defaultdict(deque)
    turns: deque[str] = deque()  # tenants with waiting jobs, the next one first
    ends: list[float] = []

    def begin(now: float) -> None:
        while turns and len(ends) < workers:
            tenant = turns.popleft()
            stay = lines[tenant].popleft()
            waits[tenant].append(now - stay.came)
            heapq.heappush(ends, now + stay.took)
            if lines[tenant]:
                turns.append(tenant)

    def pass_to(moment: float) -> None:
        while ends and ends[0] <= moment:
            begin(heapq.heappop(ends))

    for stay in stays:
        pass_to(stay.came)
        lines[stay.tenant].append(stay)
        if len(lines[stay.tenant]) == 1:
            turns.append(stay.tenant)
        begin(stay.came)
    pass_to(float("inf"))
    return waits


class Fairness(NamedTuple):
    """One tenant's waits beside those under fair queueing, in seconds."""

    jobs: int
    p50: float
    p99: float
    mean: float
    fair_mean: float
    ratio: float  # of the means, each at least FLOOR_S


def fairness(stays: Sequence[Stay], workers: int) -> dict[str, Fairness]:
    ideal = fair_waits(stays, workers)
    waits: dict[str, list[float]] = defaultdict(list)
    for stay in stays:
        waits[stay.tenant].append(stay.waited)
    table = {}
    for tenant, own in sorted(waits.items()):
        mean, fair = statistics.fmean(own), statistics.fmean(ideal[tenant])
        ratio = max(mean, FLOOR_S) / max(fair, FLOOR_S)
        table[tenant] = Fairness(len(own), share(own, 0.5), share(own, 0.99), mean, fair, ratio)
    return table


def share(values: Sequence[float], of: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(of * len(ordered)))]


class Cost(NamedTuple):
    """One call of something: what it took of this process and of Redis."""

    cpu_s: float
    calls: int
    busy_s: float
    network: int


def cost_of(redis: Redis, work: Callable[[], object]) -> Cost:
    """The cost of `work`, while nothing else uses this Redis."""
    before, began = usage_of(redis), time.process_time()
    work()
    cpu_s = time.process_time() - began
    spent = usage_of(redis).since(before)
    own = usage_of(redis).since(usage_of(redis))  # of the reading itself
    return Cost(cpu_s, spent.calls + own.calls, spent.busy_s, spent.network + own.network)
