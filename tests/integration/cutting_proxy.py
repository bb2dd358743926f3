"""A proxy that passes bytes on as they come, and ends connections in their middle."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


class CuttingProxy(socketserver.ThreadingTCPServer):
    """Each of the next connections ends after so many bytes of answers; without a plan it is passed on.

    With `only`, the plan is for connections whose first request holds that text.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), Passage)
        parts = urlsplit(target)
        self.target = (str(parts.hostname), int(parts.port or 80))
        self.cuts: deque[int] = deque()
        self.only = ""
        self.replaced: tuple[bytes, bytes] | None = None  # in requests
        self.asked: list[str] = []  # heads of requests
        self.answered = 0  # bytes
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, address: object) -> None:
        """A client that went away is no news here."""


class Passage(socketserver.BaseRequestHandler):
    server: CuttingProxy

    def handle(self) -> None:
        first = self.request.recv(4096, socket.MSG_PEEK).decode("latin-1")
        with self.server.lock:
            is_meant = self.server.only in first and self.server.cuts
            left = self.server.cuts.popleft() if is_meant else None
        with socket.create_connection(self.server.target) as upstream:
            questions = threading.Thread(target=self.pass_questions, args=(upstream,), daemon=True)
            questions.start()
            while left is None or left > 0:
                piece = upstream.recv(min(left or 65536, 65536))
                if not piece:
                    break
                self.request.sendall(piece)
                left = None if left is None else left - len(piece)
                with self.server.lock:
                    self.server.answered += len(piece)
            for end in (self.request, upstream):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # it has gone by itself
            questions.join()

    def pass_questions(self, upstream: socket.socket) -> None:
        try:
            while piece := self.request.recv(65536):
                with self.server.lock:
                    self.server.asked.append(piece.decode("latin-1"))
                upstream.sendall(piece.replace(*self.server.replaced) if self.server.replaced else piece)
            upstream.shutdown(socket.SHUT_WR)
        except OSError:
            return


@contextmanager
def cutting_proxy(target: str) -> Iterator[CuttingProxy]:
    with CuttingProxy(target) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
