"""A proxy that passes bytes on as they come, and ends connections in their middle."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections import deque

from tests.servers import Proxy


class CuttingProxy(Proxy):
    """Each of the next connections ends after so many bytes of answers; without a plan it is passed on.

    With `only`, the plan is for connections whose first request holds that text.
    """

    def __init__(self, target: str) -> None:
        super().__init__(target, Passage)
        self.cuts: deque[int] = deque()
        self.only = ""
        self.replaced: tuple[bytes, bytes] | None = None  # in requests
        self.asked: list[str] = []  # heads of requests
        self.answered = 0  # bytes
        self.lock = threading.Lock()


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
