"""The processes of `nibble up`: started in order, watched, restarted where that is safe, stopped in order."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from app.client import NibbleClient
from app.commands.checks.host import PORT_REMEDY, is_nibble, port_fault
from app.commands.terminal import ExitCode, api_key_file, local_api_key, local_url
from app.commands.up_view import MeasuringNews, Voice
from app.core.child.owned_process import OwnedProcess, exit_words
from app.core.errors import Conflict, NibbleError, Unavailable
from app.core.planning.host_devices import gpu_names

if TYPE_CHECKING:
    from app.core.jobs.worker_registry import WorkerRecord, WorkerRegistry
    from app.core.redis.redis_server import RedisServer
    from app.core.settings import Settings

POLL_S = 0.1
START_LIMIT_S = 180.0  # a busy host starts Python slowly
STOP_GRACE_S = 15.0
MAX_RESTARTS = 5  # restarts of one worker within RESTART_WINDOW_S before `nibble up` gives up
RESTART_WINDOW_S = 60.0
LOOK_S = 1.0  # between two looks at what the workers measure


class Member:
    """One process of the machine; its output is printed line by line after its name."""

    def __init__(self, name: str, module: str, *arguments: str, voice: Voice) -> None:
        self.name = name
        self.voice = voice
        self.words = [module, *arguments]
        self.starts: deque[float] = deque(maxlen=MAX_RESTARTS + 1)
        self.process: OwnedProcess | None = None

    def start(self, environment: dict[str, str]) -> None:
        """Start the process, or start it again after it has ended."""
        if self.process is not None:
            self.process.close()
        self.starts.append(time.monotonic())
        self.process = OwnedProcess(
            self.words, environment=environment, on_line=lambda line: self.voice.hear(self.name, line)
        )

    def exit_code(self) -> int | None:
        """The exit code; None while it runs."""
        return None if self.process is None else self.process.exit_code()

    def crashes_in_a_row(self) -> bool:
        return crashes_in_a_row(self.starts)

    def stop(self) -> None:
        """Stop the process and print its last lines."""
        if self.process is not None:
            self.process.stop(STOP_GRACE_S)
            self.process.close()


def crashes_in_a_row(starts: Sequence[float]) -> bool:
    return len(starts) > MAX_RESTARTS and starts[-1] - starts[0] < RESTART_WINDOW_S


class Machine:
    """Runs Redis, the API and the workers of this machine."""

    def __init__(self, settings: Settings, *, as_json: bool = False, verbose: bool = False) -> None:
        self.settings = settings
        self.voice = Voice(as_json=as_json, verbose=verbose)
        self.stop_signal: int | None = None
        self.redis_starts: deque[float] = deque(maxlen=MAX_RESTARTS + 1)

    def run(self) -> ExitCode:
        """Run until a signal or the death of a member that can't be replaced."""
        from app.core.redis.redis_server import resolve_redis
        from app.core.settings import make_folder

        self.refuse_taken_port()
        self.voice.show_busy("starting Redis, the API and the workers")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note_signal)
        make_folder(self.settings.state_dir)
        with resolve_redis(self.settings) as redis:
            if self.voice.verbose:
                self.say(f"redis: {redis.kind} ({redis.reason})")
            return self.run_members(redis, {**os.environ, "NIBBLE_REDIS_URL": redis.url})

    def refuse_taken_port(self) -> None:
        """Refuse a used address before any process is started."""
        fault, where = port_fault(self.settings), f"{self.settings.host}:{self.settings.port}"
        if fault is None:
            return
        if is_nibble(local_url(self.settings)):
            raise Conflict(
                f"a Nibble service answers at {where}",
                code="already_running",
                remedy="use it, stop it with Ctrl-C where it runs, or set NIBBLE_PORT and NIBBLE_STATE_DIR",
            )
        raise Unavailable(f"{where}: {fault}", code="port_taken", remedy=PORT_REMEDY)

    def note_signal(self, number: int, frame: object) -> None:
        self.stop_signal = number

    def run_members(self, redis: RedisServer, environment: dict[str, str]) -> ExitCode:
        api = Member("api", "app.cli", "api", voice=self.voice)
        workers = [
            Member(name, *worker_command(name, device), voice=self.voice)
            for name, device in [*worker_devices("worker"), *worker_devices("serve")]
        ]
        members = [api, *workers]
        try:
            for member in members:
                member.start(environment)
            self.await_ready(redis, members)
            self.watch_members(redis, api, workers, environment)
        except NibbleError as fault:
            self.voice.end_busy()
            self.say(f"error: {fault.message}; {fault.remedy}", style="red", event="error", code=fault.code)
            return ExitCode.FAILED
        finally:
            self.voice.end_busy()
            self.say("stopping", event="stopping")
            for member in reversed(members):
                member.stop()
        return ExitCode.OK

    def watch_members(
        self, redis: RedisServer, api: Member, workers: Sequence[Member], environment: dict[str, str]
    ) -> None:
        """Restart what has ended, until a signal. Raises Unavailable for what can't be restarted."""
        registry = registry_of(redis)
        news, look_at = MeasuringNews(self.voice), time.monotonic()
        while self.stop_signal is None:
            refuse_ended(api)
            self.replace_redis(redis)
            self.replace_ended(workers, environment)
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + LOOK_S
                news.look(living(registry))
            time.sleep(POLL_S)

    def await_ready(self, redis: RedisServer, members: Sequence[Member]) -> None:
        """Return once the API accepts jobs and every worker is idle."""
        url, registry = local_url(self.settings), registry_of(redis)
        expected = {registered_name(member.name) for member in members[1:]}
        deadline = time.monotonic() + START_LIMIT_S
        is_ready = False
        with NibbleClient(url) as client:
            while not is_ready or not expected <= {worker.name for worker in living(registry)}:
                is_ready = is_ready or client.ready()
                if self.stop_signal is not None:
                    return
                for member in members:
                    refuse_ended(member)
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"the service was not ready after {START_LIMIT_S:.0f} s",
                        remedy="read the lines above; `nibble doctor` checks this machine",
                    )
                time.sleep(POLL_S)
        self.say_ready(url)

    def say_ready(self, url: str) -> None:
        is_configured = self.settings.bootstrap_api_key is not None
        key_source = "NIBBLE_BOOTSTRAP_API_KEY" if is_configured else str(api_key_file(self.settings))
        with NibbleClient(url, api_key=local_api_key(self.settings)) as client:
            link = url + client.login_link().path
        if self.voice.as_json:
            self.say(f"ready at {url}", event="ready", url=url, login=link, api_key=key_source)
            return
        roots = ", ".join(map(str, self.settings.model_roots))
        models = (
            f"from the hub, s3:// and {roots}" if roots else "from the hub and s3:// (NIBBLE_MODEL_ROOTS)"
        )
        self.voice.show_ready(url, link, key_source, models)

    def replace_redis(self, redis: RedisServer) -> None:
        """Restart a dead Redis with its data and address; the other processes reconnect."""
        if redis.is_alive:
            return
        self.redis_starts.append(time.monotonic())
        if crashes_in_a_row(self.redis_starts):
            raise Unavailable(
                f"Redis has ended {len(self.redis_starts)} times within {RESTART_WINDOW_S:.0f} s",
                remedy="read redis/server.log in NIBBLE_STATE_DIR; its records are on disk",
            )
        self.say("redis has ended; starting it again")
        redis.restart(self.settings)

    def replace_ended(self, workers: Sequence[Member], environment: dict[str, str]) -> None:
        """Restart a dead worker; the service recovers its job."""
        for worker in workers:
            code = worker.exit_code()
            if code is None:
                continue
            self.voice.show_tail(worker.name)
            if worker.crashes_in_a_row():
                refuse_ended(worker)
            self.say(f"{worker.name} ended with {exit_words(code)}; starting it again")
            worker.start(environment)

    def say(self, line: str, *, style: str = "", **facts: str) -> None:
        self.voice.say("nibble", line, style=style, **facts)


def registry_of(redis: RedisServer) -> WorkerRegistry:
    from app.core.jobs.worker_registry import WorkerRegistry
    from app.core.redis.redis_server import connect

    return WorkerRegistry(connect(redis.url))


def living(registry: WorkerRegistry) -> list[WorkerRecord]:
    """The workers that send heartbeats; none while Redis is away."""
    from redis.exceptions import RedisError

    try:
        return registry.living()
    except RedisError:
        return []


def refuse_ended(member: Member) -> None:
    code = member.exit_code()
    if code is not None:
        member.voice.show_tail(member.name)
        raise Unavailable(
            f"{member.name} ended with {exit_words(code)}",
            remedy="read its lines above; `nibble doctor` checks this machine",
        )


def worker_command(name: str, device: str) -> tuple[str, ...]:
    """Separate processes run jobs and serve, so that a machine does both at once."""
    module = "workers.replicas.replica_supervisor" if name.startswith("serve") else "workers.main"
    return (module, "--device", device, "--name", registered_name(name))


def registered_name(name: str) -> str:
    """The name of a worker of this process."""
    return f"{socket.gethostname()[:32]}-{name}-{os.getpid()}"


def worker_devices(kind: str) -> list[tuple[str, str]]:
    """Name and device of each worker of a kind: one for every GPU, else one on the CPU."""
    count = len(gpu_names())
    return [(f"{kind}{number}", f"cuda:{number}") for number in range(count)] or [(kind, "cpu")]
