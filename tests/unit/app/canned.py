"""A small HTTP server with canned answers, and the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from app.cli import main
from tests.servers import running

MISSING = {"detail": "no such thing", "code": "not_found", "remedy": "look again"}


@dataclass
class Canned:
    """Answers by `METHOD path`; what was asked is kept. `then` replaces an answer once it was given."""

    url: str = ""
    answers: dict[str, tuple[int, object]] = field(default_factory=dict)
    then: dict[str, tuple[int, object]] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)

    def answer_to(self, route: str) -> tuple[int, object]:
        given = self.answers.get(route, (404, MISSING))
        if route in self.then:
            self.answers[route] = self.then.pop(route)
        return given


@contextmanager
def canned_service(answers: dict[str, tuple[int, object]] | None = None) -> Iterator[Canned]:
    canned = Canned(answers=answers or {})

    class Answering(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            canned.requests.append((f"{self.command} {self.path}", dict(self.headers), body))
            status, document = canned.answer_to(f"{self.command} {self.path.partition('?')[0]}")
            content = document.encode() if isinstance(document, str) else json.dumps(document).encode()
            self.send_response(status)
            if status != 204:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if status != 204:
                self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_DELETE = answer

        def log_message(self, *arguments: object) -> None:
            """Keep the test's output clean."""

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Answering)) as server:
        canned.url = f"http://127.0.0.1:{server.server_port}"
        yield canned


def run(*arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int | None)
    return int(ended.value.code or 0)
