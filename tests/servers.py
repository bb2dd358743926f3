"""Servers in a thread of the test, the frame of proxies that break connections; Valkey and SeaweedFS."""

from __future__ import annotations

import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from app.core.redis.redis_programs import embedded_binary
from app.core.redis.redis_server import connect, wait_for_redis

ServerT = TypeVar("ServerT", bound=socketserver.BaseServer)


@contextmanager
def running(server: ServerT) -> Iterator[ServerT]:
    """The server answers until the block ends."""
    with server:
        # How often it looks for its end: by default that takes half a second.
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Proxy(socketserver.ThreadingTCPServer):
    """On a free port, before the server at `target`. What breaks, and when, is the passage's."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, target: str, passage: type[socketserver.BaseRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), passage)
        parts = urlsplit(target)
        self.target = (str(parts.hostname), int(parts.port or 80))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, address: object) -> None:
        """A client that went away is no news here."""


@contextmanager
def valkey(folder: Path) -> Iterator[str]:
    """The URL of a Valkey process on a socket in that folder; of the program REDIS_SERVER if that is set."""
    binary = os.environ.get("REDIS_SERVER") or embedded_binary()
    assert binary is not None, "install the extra [embedded]"
    path = folder / "s"
    command = [binary, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        url = f"unix://{path}"
        client = connect(url)
        wait_for_redis(client)
        client.close()
        yield url
        process.terminate()


S3_USER = {
    "name": "test",
    "credentials": [{"accessKey": "test", "secretKey": "test"}],
    "actions": ["Admin", "Read", "Write", "List"],
}


@contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """The URL of an S3 server: SeaweedFS, with one user `test`."""
    (folder / "data").mkdir()
    users = folder / "s3.json"
    users.write_text(json.dumps({"identities": [S3_USER]}))
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port")
    ports = dict(zip((*names, "filer.port.grpc", "s3.port", "s3.port.grpc"), free_ports(8), strict=True))
    command = [
        str(Path(sys.executable).with_name("weed")), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1",
        "-s3", f"-s3.config={users}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false",
        "-volume.max=20", "-master.volumeSizeLimitMB=64",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    with (
        (folder / "weed.log").open("wb") as log,
        subprocess.Popen(command, cwd=folder, stdout=log, stderr=log) as process,
    ):
        yield f"http://127.0.0.1:{ports['s3.port']}"
        process.kill()


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
