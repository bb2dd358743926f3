"""The whole service as processes that can be killed: Redis and S3 behind proxies, the API, two workers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import httpx
import psutil
from redis import Redis
from redis.exceptions import RedisError

from app.core.errors import Unavailable
from app.core.jobs.job_store import JobStore
from app.core.redis.redis_programs import embedded_binary
from app.core.redis.redis_server import connect
from app.core.storage.object_store import ObjectStore
from tests.faults.proxy import FaultProxy
from tests.faults.redis_proxy import RedisProxy, redis_proxy
from tests.integration.api_service import ADMIN_KEY
from tests.integration.workshop import REPOSITORY
from tests.servers import running

T = TypeVar("T")
LEASE_S = 2.0
WORKERS = ("one", "two")
# Shifts the wall clock of a process; the steady clock stays as it is.
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *now) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int result = real(id, now);
  const char *offset = getenv("CLOCK_OFFSET_S");
  if (result == 0 && id == CLOCK_REALTIME && offset) now->tv_sec += atol(offset);
  return result;
}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def patiently(
    ask: Callable[[], T], *, meanwhile: Callable[[], None] = lambda: None, limit_s: float = 60
) -> T:
    """What `ask` gives, once Redis, the API and the storage answer."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return ask()
        except (RedisError, httpx.TransportError, Unavailable):
            assert time.monotonic() < deadline, "it does not come back"
            meanwhile()
            time.sleep(0.1)


class Process:
    """One that is started again when it has died, as a service manager does."""

    def __init__(self, name: str, command: list[str], world: World) -> None:
        self.name = name
        self.clock_offset_s = 0
        self._command = command
        self._world = world
        self.start()

    def start(self) -> None:
        environment = dict(self._world.environment)
        if self.clock_offset_s:
            shift = {"LD_PRELOAD": str(self._world.clock), "CLOCK_OFFSET_S": str(self.clock_offset_s)}
            environment |= shift
        with (self._world.folder / f"{self.name}.log").open("ab") as log:
            self.popen = subprocess.Popen(
                self._command, env=environment, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True
            )

    def mend(self) -> None:
        if self.popen.poll() is not None:
            self.start()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def tree(self) -> list[psutil.Process]:
        """The process and its descendants, the eldest first."""
        try:
            eldest = psutil.Process(self.popen.pid)
            return [eldest, *eldest.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


class World:
    """Everything that runs, with handles to break it."""

    def __init__(self, folder: Path, s3: str, proxy: FaultProxy, network: RedisProxy) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.proxy = proxy
        self.network = network  # between Redis and those that use it
        self.clock = self._compile_clock()
        self.port = free_port()
        redis_url = f"unix://{folder / 'redis' / 's'}"
        httpx.put(f"{s3}/store").raise_for_status()
        self.environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "NIBBLE_STATE_DIR": str(self.state),
            "NIBBLE_REDIS_URL": f"unix://{network.socket}",
            "NIBBLE_STORAGE_URL": "s3://store/nibble",
            "NIBBLE_MODEL_ROOTS": str(REPOSITORY / "examples"),
            "NIBBLE_BOOTSTRAP_API_KEY": ADMIN_KEY,
            "NIBBLE_PORT": str(self.port),
            "NIBBLE_LEASE_S": str(LEASE_S),
            "NIBBLE_JANITOR_INTERVAL_S": "0.3",
            "NIBBLE_CANCEL_GRACE_S": "1",
            "NIBBLE_MAX_ATTEMPTS": "20",
            "NIBBLE_RETRY_PAUSE_S": "0.1",
        }
        self.valkey = Process("valkey", self._valkey_command(), self)
        self.redis: Redis = connect(redis_url)
        patiently(self.redis.ping)
        self.api = Process("api", [sys.executable, "-m", "app.cli", "api"], self)
        worker = [sys.executable, "-m", "tests.integration.stand_in_worker"]
        self.workers = [Process(name, [*worker, name], self) for name in WORKERS]
        self.store = JobStore(self.redis)
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            headers={"Authorization": f"Bearer {ADMIN_KEY}"},
            timeout=20,
            trust_env=False,
        )
        patiently(lambda: self.client.get("/readyz"))

    @property
    def processes(self) -> list[Process]:
        return [self.valkey, self.api, *self.workers]

    def mend(self) -> None:
        for process in self.processes:
            process.mend()

    def patiently(self, ask: Callable[[], T]) -> T:
        """What `ask` gives; what has died meanwhile is started again."""
        return patiently(ask, meanwhile=self.mend)

    def objects(self) -> ObjectStore:
        """The storage as it is, with no proxy in between."""
        os.environ["AWS_ENDPOINT_URL"] = "http://{}:{}".format(*self.proxy.target)
        return ObjectStore("s3://store/nibble")

    def stop(self) -> None:
        """End everything in order; what doesn't end is killed."""
        for process in (*self.workers, self.api, self.valkey):
            if process.popen.poll() is None:
                process.popen.send_signal(signal.SIGCONT)
                process.popen.terminate()
        for process in (*self.workers, self.api, self.valkey):
            try:
                process.popen.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
        self.client.close()
        self.redis.close()

    def _valkey_command(self) -> list[str]:
        binary = embedded_binary()
        assert binary is not None, "install the extra [embedded]"
        folder = self.folder / "redis"
        return [
            *(binary, "--port", "0", "--unixsocket", str(folder / "s"), "--dir", str(folder)),
            *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
        ]

    def _compile_clock(self) -> Path:
        path = self.folder / "clock.so"
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(path), "-x", "c", "-", "-ldl"]
        subprocess.run(command, input=CLOCK.encode(), check=True, timeout=60)
        return path


@contextmanager
def running_world(folder: Path, s3: str) -> Iterator[World]:
    with ExitStack() as stack:
        (folder / "redis").mkdir(parents=True)
        proxy = stack.enter_context(running(FaultProxy(s3)))
        network = stack.enter_context(redis_proxy(folder / "redis" / "p", folder / "redis" / "s"))
        world = World(folder, s3, proxy, network)
        stack.callback(world.stop)
        yield world
