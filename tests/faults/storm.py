"""A seeded storm: jobs are submitted while what executes them is killed, halted, cut off and lied to."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

import httpx
import psutil
from rq import Queue

from app.core.jobs.job_queue import RUN_JOB_TASK, queue_name
from app.core.jobs.worker_registry import WorkerRegistry
from app.core.records.job import TERMINAL
from tests.faults.proxy import KINDS
from tests.faults.world import LEASE_S, Process, World
from tests.integration.api_service import MODEL

ACTIVE_JOBS = 5
FOLLOWED = 4
CLOCK_JUMP_S = 3600


class Follower(threading.Thread):
    """Reads the events of a job as a stream and, when it breaks, goes on after the last one it saw."""

    def __init__(self, world: World, job_id: str) -> None:
        super().__init__(name=f"follower of {job_id}", daemon=True)
        self._world = world
        self.job_id = job_id
        self.seen: list[str] = []
        self.has_ended = False

    def run(self) -> None:
        while not self.has_ended:
            headers = {"Accept": "text/event-stream"}
            if self.seen:
                headers["Last-Event-ID"] = self.seen[-1]
            with contextlib.suppress(httpx.TransportError):
                self._read(headers)
            time.sleep(0.1)

    def _read(self, headers: dict[str, str]) -> None:
        route = f"/v1/jobs/{self.job_id}/events"
        with self._world.client.stream("GET", route, headers=headers) as answer:
            if answer.status_code == 204:
                self.has_ended = True
            for line in answer.iter_lines():
                if line.startswith("id: "):
                    self.seen.append(line[4:])


class Storm:
    """Chooses everything by its seed, but for the moments at which processes happen to be where they are."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.jobs: dict[str, str] = {}  # idempotency key -> job
        self.layers: dict[str, int] = {}
        self.cancelled: set[str] = set()
        self.followers: list[Follower] = []
        self._slow: list[socket.socket] = []
        self._waking: list[tuple[float, list[psutil.Process]]] = []
        self._kinds: list[tuple[int, Callable[[], bool]]] = [
            (3, self.kill_worker), (3, self.kill_horse), (3, self.kill_child), (2, self.kill_api),
            (1, self.kill_redis), (2, self.halt_worker), (4, self.break_storage), (2, self.deliver_twice),
            (2, self.cancel), (1, self.jump_clock), (2, self.fill_disk), (2, self.slow_redis),
            (1, self.split_network), (1, self.slow_clients),
        ]  # fmt: skip

    def rage(self, faults: int) -> None:
        """Inject so many faults, while jobs are kept coming; then let everything heal."""
        due = time.monotonic() + 1.0
        while self.faults.total() < faults:
            self.tick()
            if len(self.active()) < ACTIVE_JOBS:
                self.submit()
            if time.monotonic() >= due:
                self.strike()
                due = time.monotonic() + self.random.uniform(0.2, 0.9)
        self.world.proxy.pending.clear()
        self.world.proxy.changing = 0
        self.world.network.heal()

    def settle(self, limit_s: float) -> None:
        """Wait until every job has ended."""
        deadline = time.monotonic() + limit_s
        while self.active():
            self.tick()
            assert time.monotonic() < deadline, f"jobs did not end: {self.active()}"
        while not all(follower.has_ended for follower in self.followers):
            self.tick()
            assert time.monotonic() < deadline, "followers did not hear the end"

    def await_workers(self, limit_s: float) -> None:
        """Wait until those that were killed last take jobs again: a worker that starts can't end in order."""
        deadline = time.monotonic() + limit_s
        registry = WorkerRegistry(self.world.redis)
        while True:
            self.tick()
            living = {record.pid for record in self.world.patiently(registry.living)}
            if not self._waking and living >= {worker.popen.pid for worker in self.world.workers}:
                return
            assert time.monotonic() < deadline, "a worker does not come back"

    def summary(self) -> str:
        storage = dict(Counter(self.world.proxy.met))
        return (
            f"{self.faults.total()} faults in {len(self.jobs)} jobs: {dict(self.faults)}; storage: {storage}"
        )

    def tick(self) -> None:
        time.sleep(0.05)
        now = time.monotonic()
        for moment, halted in [*self._waking]:
            if now >= moment:
                self._waking.remove((moment, halted))
                send(halted, signal.SIGCONT)
        self.world.mend()

    def strike(self) -> None:
        weights, kinds = zip(*self._kinds, strict=True)
        kind = self.random.choices(kinds, weights)[0]
        if kind():
            self.faults[kind.__name__] += 1

    def active(self) -> list[str]:
        return [
            job_id
            for job_id in self.jobs.values()
            if self.world.patiently(lambda known=job_id: self.world.store.load(known)).state not in TERMINAL  # type: ignore[misc]
        ]

    def submit(self) -> None:
        """Hand over a job, with one key through all failures: it must be one job in the end."""
        key = f"job-{len(self.jobs)}"
        layers = self.random.randint(3, 6)
        labels = {"layers": str(layers), "pause": str(self.random.choice([0.05, 0.1, 0.2]))}
        body = {"model": MODEL, "labels": labels, "force": True}
        headers = {"Idempotency-Key": key}
        for _ in range(200):
            self.world.mend()
            with contextlib.suppress(httpx.TransportError):
                answer = self.world.client.post("/v1/jobs", json=body, headers=headers)
                if answer.status_code in (200, 202):
                    self.note(key, answer.json()["id"], layers)
                    return
                assert answer.status_code == 503, answer.text
            time.sleep(0.1)
        raise AssertionError("the API does not come back")

    def note(self, key: str, job_id: str, layers: int) -> None:
        self.jobs[key] = job_id
        self.layers[job_id] = layers
        if len(self.followers) < FOLLOWED:
            self.followers.append(Follower(self.world, job_id))
            self.followers[-1].start()

    def a_worker(self) -> Process:
        return self.random.choice(self.world.workers)

    def kill_worker(self) -> bool:
        self.a_worker().kill()
        return True

    def kill_horse(self) -> bool:
        """The supervisor of an attempt: a fork of the worker."""
        return self.kill_descendant(1)

    def kill_child(self) -> bool:
        return self.kill_descendant(2)

    def kill_descendant(self, generation: int) -> bool:
        worker = self.a_worker()
        tree = worker.tree()
        if len(tree) <= generation:
            return False
        send(tree[generation : generation + 1], signal.SIGKILL)
        return True

    def kill_api(self) -> bool:
        self.world.api.kill()
        return True

    def kill_redis(self) -> bool:
        self.world.valkey.kill()
        time.sleep(self.random.uniform(0, 1.0))
        return True

    def halt_worker(self) -> bool:
        """SIGSTOP for longer than the lease; it goes on when somebody else has its job."""
        halted = self.a_worker().tree()
        send(halted, signal.SIGSTOP)
        self._waking.append((time.monotonic() + LEASE_S * self.random.uniform(1.1, 2.0), halted[::-1]))
        return bool(halted)

    def break_storage(self) -> bool:
        kind = self.random.choice(KINDS)
        self.world.proxy.pending.extend([kind] * self.random.choice([1, 1, 3, 12]))
        return True

    def deliver_twice(self) -> bool:
        """A second queue entry for an attempt that exists."""
        active = self.active()
        if not active:
            return False
        job = self.world.patiently(lambda: self.world.store.load(self.random.choice(active)))
        attempt = job.attempt + self.random.choice([0, 1])

        def deliver() -> object:
            queue = Queue(queue_name(job), connection=self.world.redis, serializer="json")
            return queue.enqueue_call(RUN_JOB_TASK, args=(job.id, attempt), timeout=600)

        self.world.patiently(deliver)
        return True

    def cancel(self) -> bool:
        active = self.active()
        if not active:
            return False
        job_id = self.random.choice(active)
        self.cancelled.add(job_id)
        with contextlib.suppress(httpx.TransportError):
            self.world.client.post(f"/v1/jobs/{job_id}/cancel")
        return True

    def jump_clock(self) -> bool:
        """A host whose clock is an hour off: it comes back as such."""
        process = self.random.choice([self.world.api, *self.world.workers])
        process.clock_offset_s = self.random.choice([-CLOCK_JUMP_S, 0, CLOCK_JUMP_S])
        process.kill()
        return True

    def fill_disk(self) -> bool:
        """No file of a running attempt grows any more: writes fail as on a full disk, for this attempt."""
        attempt = self.a_worker().tree()[1:]
        for process in attempt:
            with contextlib.suppress(psutil.Error):
                process.rlimit(psutil.RLIMIT_FSIZE, (0, process.rlimit(psutil.RLIMIT_FSIZE)[1]))
        return bool(attempt)

    def slow_redis(self) -> bool:
        self.world.network.slow_down(self.random.uniform(0.01, 0.2), self.random.uniform(0.5, 3.0))
        return True

    def split_network(self) -> bool:
        """Redis is out of reach, for less or for more than a lease."""
        self.world.network.cut_off(LEASE_S * self.random.uniform(0.3, 1.7))
        return True

    def slow_clients(self) -> bool:
        """Connections on which no whole request ever arrives; they are left open."""
        for _ in range(self.random.choice([5, 20])):
            with contextlib.suppress(OSError):
                slow = socket.create_connection(("127.0.0.1", self.world.port), timeout=1)
                slow.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0")
                self._slow.append(slow)
        return True

    def close(self) -> None:
        for slow in self._slow:
            slow.close()


def send(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
