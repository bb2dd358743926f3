"""Servers in a thread of the test, and the frame of proxies that break connections."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlsplit

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
