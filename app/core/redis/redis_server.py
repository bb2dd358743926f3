"""Which Redis the service uses: a given URL, or a server of this machine (`redis_programs`).

A server of our own listens on a unix socket only, keeps an append-only file in the state folder and dies
with the process that started it. A lock file lets one process start it; the others use its socket.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal, Self

from redis import Redis
from redis import exceptions as redis_errors
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry

from app.core.errors import InvalidRequest, Unavailable
from app.core.redis.redis_programs import find_program, note_writer
from app.core.settings import Settings

log = logging.getLogger(__name__)

MAX_MEMORY = "1gb"
START_LIMIT_S = 60.0  # reading a large append-only file takes its time
STOP_LIMIT_S = 10.0
MAX_SOCKET_PATH = 100  # sockaddr_un holds 108 bytes on Linux and 104 on macOS
PR_SET_PDEATHSIG = 1

# How it was found: NIBBLE_REDIS_URL, a program of PATH, the embedded one, or another process that runs it.
Kind = Literal["url", "server", "embedded", "shared"]


def connect(url: str, *, timeout_s: float | None = 5.0) -> Redis:
    """A client for short commands, which retries lost connections. Blocking readers pass None."""
    try:
        return Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=5.0,
            health_check_interval=30,
            retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), 3),
            retry_on_error=[redis_errors.ConnectionError, redis_errors.TimeoutError],
        )
    except ValueError as fault:
        # Without the URL: it may hold a password.
        raise InvalidRequest(
            f"NIBBLE_REDIS_URL can't be used: {fault}",
            code="redis_url_invalid",
            remedy="write redis://host:6379/0, rediss://… or unix:///path",
        ) from fault


class RedisServer:
    """A Redis in use. As a context manager it stops what it started, and nothing else."""

    def __init__(
        self, url: str, kind: Kind, reason: str, *, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.url = url
        self.kind: Kind = kind
        self.reason = reason
        self._process = process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """The process id of a server that this process started."""
        return self._process.pid if self._process is not None else None

    @property
    def is_alive(self) -> bool:
        """False if the server that this process started has ended."""
        return self._process is None or self._process.poll() is None

    def restart(self, settings: Settings) -> None:
        """Start the server again after it has ended: same folder, same address."""
        again = own_server(settings)
        self.kind, self._process = again.kind, again._process

    def stop(self) -> None:
        """End the server that this process started: it writes its file and goes."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def resolve_redis(settings: Settings) -> RedisServer:
    """The Redis of these settings, started if need be.

    Call it from a thread that lives as long as the server shall: the kernel ends the server with it.
    """
    if settings.redis_url is not None:
        server = RedisServer(settings.redis_url, "url", "NIBBLE_REDIS_URL is set")
    else:
        server = own_server(settings)
    log.info("redis: %s (%s)", server.kind, server.reason)
    return server


def own_server(settings: Settings) -> RedisServer:
    """The server of the state folder: started here, or by another process and shared."""
    folder = settings.state_dir / "redis"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    socket = socket_path(folder)
    url = f"unix://{socket}"
    with (folder / "lock").open("wb") as lock:
        deadline = time.monotonic() + START_LIMIT_S
        while not locked(lock):
            if answers(url):
                return RedisServer(url, "shared", f"another process runs the server of {folder}")
            refuse_late(deadline, folder)
        program, why = find_program(settings.redis_server, folder)
        socket.unlink(missing_ok=True)
        process = start_server(program.path, folder, socket, lock)
    server = RedisServer(url, program.kind, f"{program}: {why}", process=process)
    try:
        while not answers(url):
            refuse_late(deadline if server.is_alive else 0.0, folder)
        note_writer(folder, program.version)
    except BaseException:
        server.stop()
        raise
    return server


def locked(lock: IO[bytes]) -> bool:
    """True if this process now holds the lock file."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def answers(url: str) -> bool:
    """True if a server answers at `url` and has read its file."""
    client = Redis.from_url(url, socket_timeout=5.0, retry=Retry(NoBackoff(), 0))
    try:
        return bool(client.ping())
    except (redis_errors.ConnectionError, redis_errors.TimeoutError):
        return False
    finally:
        client.close()


def refuse_late(deadline: float, folder: Path) -> None:
    """Wait a moment; Unavailable if `deadline` has passed."""
    if time.monotonic() > deadline:
        raise Unavailable(
            f"the Redis server of {folder} did not start: {last_line(folder / 'server.log')}",
            code="redis_not_started",
            remedy=f"read {folder / 'server.log'}; copy the folder before any attempt at a repair",
        )
    time.sleep(0.02)


def socket_path(folder: Path) -> Path:
    """The socket in `folder`, or, if that path is too long for a socket, in a private temporary folder."""
    path = folder / "redis.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        return path
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    short = Path(tempfile.gettempdir()) / f"nibble-{os.getuid()}-{digest}"
    short.mkdir(mode=0o700, exist_ok=True)
    status = short.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise Unavailable(
            f"{short} is not a private folder of this user",
            code="redis_socket_unsafe",
            remedy="remove it, or choose a shorter NIBBLE_STATE_DIR",
        )
    return short / "redis.sock"


def start_server(binary: str, folder: Path, socket: Path, lock: IO[bytes]) -> subprocess.Popen[bytes]:
    """The server as a child. It inherits the lock, which so lasts exactly as long as the server."""
    command = [
        binary,
        *("--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700"),
        *("--dir", str(folder), "--logfile", str(folder / "server.log")),
        *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
        *("--maxmemory", MAX_MEMORY, "--maxmemory-policy", "noeviction", "--protected-mode", "yes"),
    ]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(lock.fileno(),),
        # Its own session: an interrupt at the terminal must reach the service first.
        start_new_session=True,
        preexec_fn=die_with_parent(),
    )


def die_with_parent() -> Callable[[], None] | None:
    """What a child runs first to be killed with its parent (Linux); None where there is no such call."""
    if sys.platform != "linux":
        return None
    # Loaded before the fork: after it, nothing may take a lock.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def arm() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return arm


def last_line(path: Path) -> str:
    if not path.exists():
        return "it wrote no log"
    lines = path.read_text(errors="replace").splitlines()
    return lines[-1] if lines else "its log is empty"


def wait_for_redis(redis: Redis, *, limit_s: float = 30.0) -> None:
    """Return once `redis` answers; Unavailable after `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            redis.ping()
        except redis_errors.RedisError as fault:
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"Redis does not answer: {fault}",
                    code="redis_unavailable",
                    remedy="check NIBBLE_REDIS_URL and that the server runs",
                ) from fault
            time.sleep(0.2)
        else:
            return
