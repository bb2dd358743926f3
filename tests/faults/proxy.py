"""A proxy in front of an S3 server that breaks answers on demand."""

from __future__ import annotations

import http.client
import socket
import struct
import time
from collections import deque
from http.server import BaseHTTPRequestHandler

from tests.servers import Proxy

# `lost`: the request is carried out, and its answer never arrives. `changed`: one bit of a checkpoint.
KINDS = ("500", "503", "412", "reset", "lost", "truncated", "slow", "changed")
SLOW_S = 1.5
CODES = {500: "InternalError", 503: "SlowDown", 412: "PreconditionFailed", 403: "ExpiredToken"}


class FaultProxy(Proxy):
    """Each of the next requests meets a fault of `pending`; without one it is passed on."""

    def __init__(self, target: str) -> None:
        super().__init__(target, Passage)
        self.pending: deque[str] = deque()
        self.met: list[str] = []
        self.changing = 0  # reads of checkpoints that will be changed

    def next_fault(self, method: str, path: str) -> str | None:
        """The fault that this request meets.

        Only conditional writes can be refused with 412. Only what carries a digest can be told from what was
        changed on its way: other reads wait for the storage's own checks, which are not here.
        """
        is_checkpoint = method == "GET" and "/checkpoints/" in path
        if is_checkpoint and self.changing > 0:
            self.changing -= 1
            self.met.append("changed")
            return "changed"
        try:
            fault = self.pending.popleft()
        except IndexError:
            return None
        if fault == "changed":
            self.changing += 1
            return None
        if fault == "412" and method != "PUT":
            return None
        self.met.append(fault)
        return fault


class Passage(BaseHTTPRequestHandler):
    server: FaultProxy
    protocol_version = "HTTP/1.1"

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        fault = self.server.next_fault(self.command, self.path)
        if fault == "412" and "if-none-match" not in {name.lower() for name in self.headers}:
            fault = None
        if fault in ("500", "503", "412", "403"):
            self.refuse(int(fault))
            return
        if fault == "reset":
            self.reset()
            return
        if fault == "slow":
            time.sleep(SLOW_S)
        status, headers, content = self.ask(body)
        if fault == "lost":
            self.reset()
            return
        if fault == "changed" and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.answer(status, headers, content, cut=fault == "truncated" and len(content) > 1)

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = pass_on  # names of the base class

    def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.server.target, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool) -> None:
        self.send_response_only(status)
        skipped = {"connection", "transfer-encoding"}
        if self.command != "HEAD":
            skipped.add("content-length")
        for name, value in headers:
            if name.lower() not in skipped:
                self.send_header(name, value)
        if self.command != "HEAD" and status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def refuse(self, status: int) -> None:
        code = CODES[status]
        content = f"<Error><Code>{code}</Code><Message>broken on purpose</Message></Error>".encode()
        self.answer(status, [("Content-Type", "application/xml")], content, cut=False)

    def reset(self) -> None:
        """End the connection with RST instead of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing."""
