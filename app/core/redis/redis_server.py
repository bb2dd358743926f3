"""Opens the Redis of the service: that of NIBBLE_REDIS_URL, or a server of this machine (`redis_programs`).

A server of our own listens on a unix socket only, keeps an append-only file in the state folder and dies
with the process that started it. A lock file lets one process start it; the others use its socket.
"""

from __future__ import annotations

import hashlib
import logging
import os
import ssl
import stat
import tempfile
import time
from pathlib import Path
from typing import IO, Literal, Self

from redis import Redis
from redis import exceptions as redis_errors
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry

from app.core.child.owned_process import OwnedProcess
from app.core.child.start import PROGRAM
from app.core.errors import InvalidRequest, Unavailable
from app.core.redis.redis_programs import find_program, note_writer
from app.core.settings import Settings
from app.core.storage.file_lock import try_lock

log = logging.getLogger(__name__)

MAX_MEMORY = "1gb"
# Of each job's stream of events at first: the server's own 4096 are four times what most jobs need.
EVENT_BYTES = "1024"
START_LIMIT_S = 60.0  # reading a large append-only file takes its time
STOP_LIMIT_S = 10.0
CERTIFICATE_REMEDY = (
    "name its authority in NIBBLE_REDIS_URL: rediss://host:6379/0?ssl_ca_certs=/path/to/ca.pem"
)
MAX_SOCKET_PATH = 100  # sockaddr_un holds 108 bytes on Linux and 104 on macOS

# The server's origin: NIBBLE_REDIS_URL, a program of PATH, the embedded one, or another process that runs it.
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

    def __init__(self, url: str, kind: Kind, reason: str, *, process: OwnedProcess | None = None) -> None:
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
        return self._process is None or not self._process.has_ended()

    def restart(self, settings: Settings) -> None:
        """Start the server again after it has ended: same folder, same address."""
        self.stop()
        again = own_server(settings)
        self.kind, self._process = again.kind, again._process

    def stop(self) -> None:
        """End the server that this process started: it writes its file and goes."""
        if self._process is not None:
            self._process.stop(STOP_LIMIT_S)
            self._process.close()


def resolve_redis(settings: Settings) -> RedisServer:
    """The Redis of these settings, started if need be.

    Call it from a thread that outlives the server: the kernel ends the server with it.
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
        while not try_lock(lock):
            if answers(url):
                return RedisServer(url, "shared", f"another process runs the server of {folder}")
            refuse_late(deadline, folder)
        program, why = find_program(settings.redis_server, folder)
        socket.unlink(missing_ok=True)
        process = start_redis(program.path, folder, socket, lock)
    server = RedisServer(url, program.kind, f"{program}: {why}", process=process)
    try:
        while not answers(url):
            refuse_late(deadline if server.is_alive else 0.0, folder)
        note_writer(folder, program.version)
    except BaseException:
        server.stop()
        raise
    return server


def answers(url: str) -> bool:
    """Whether a server answers at `url` and has loaded its file."""
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


def start_redis(binary: str, folder: Path, socket: Path, lock: IO[bytes]) -> OwnedProcess:
    """The server as a process of ours. It inherits the lock, which so lasts exactly as long as the server."""
    words = [
        *(PROGRAM, binary),
        *("--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700"),
        *("--dir", str(folder), "--logfile", str(folder / "server.log")),
        *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
        *("--stream-node-max-bytes", EVENT_BYTES),
        *("--maxmemory", MAX_MEMORY, "--maxmemory-policy", "noeviction", "--protected-mode", "yes"),
    ]
    return OwnedProcess(words, fds=(lock.fileno(),))


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
            if reason := untrusted_certificate(fault):
                raise Unavailable(
                    f"the certificate of Redis is not trusted: {reason}",
                    code="redis_untrusted",
                    remedy=CERTIFICATE_REMEDY,
                ) from fault
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"Redis does not answer: {fault}",
                    code="redis_unavailable",
                    remedy="check NIBBLE_REDIS_URL and that the server runs",
                ) from fault
            time.sleep(0.2)
        else:
            return


def untrusted_certificate(fault: BaseException) -> str | None:
    """OpenSSL's reason if a connection failed since the server's certificate is not trusted."""
    cause: BaseException | None = fault
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message
        cause = cause.__cause__ or cause.__context__
    return None
