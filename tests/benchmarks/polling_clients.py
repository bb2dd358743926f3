"""The clients of the polling benchmark, as a process of their own: a plan on stdin, how it went on stdout."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from typing import Any

DWELL = 8  # requests of a client before it turns to another page
WARM_UP_S = 5.0
ORDER = ("jobs", "job", "workers", "deployments")


class Client(asyncio.Protocol):
    """A dashboard: one connection, one request at a time, the tags of what it has seen."""

    def __init__(self, cookie: str, paths: list[str], results: Results) -> None:
        self._cookie = cookie
        self._paths = paths
        self._results = results
        self._turn = random.randrange(len(paths))
        self._shown = random.randrange(DWELL)  # times that this page was asked for
        self._tags: dict[str, bytes] = {}
        self._waiting: list[float] = []  # when each request was due; the first one is on its way
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def ask(self, due: float) -> None:
        self._waiting.append(due)
        if len(self._waiting) == 1:
            self._send()

    def _send(self) -> None:
        if self._transport is None:
            self._results.broken += len(self._waiting)
            self._waiting.clear()
            return
        self._shown += 1
        if self._shown >= DWELL:
            self._turn, self._shown = (self._turn + 1) % len(self._paths), 0
        path = self._paths[self._turn]
        tag = self._tags.get(path)
        known = b"If-None-Match: " + tag + b"\r\n" if tag is not None else b""
        self._transport.write(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {self._cookie}\r\n"
            "Accept: application/json\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64) dashboard\r\n"
            "Accept-Encoding: gzip, deflate, br\r\nAccept-Language: en\r\nSec-Fetch-Site: same-origin\r\n"
            "".encode() + known + b"\r\n"
        )  # fmt: skip

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        lines = bytes(self._received[:end]).split(b"\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])
        }
        size = end + 4 + int(headers.get(b"content-length", 0))
        if len(self._received) < size:
            return
        del self._received[:size]
        status = int(lines[0].split()[1])
        path = self._paths[self._turn]
        if b"etag" in headers:
            self._tags[path] = headers[b"etag"]
        self._results.note(self._waiting.pop(0), ORDER[self._turn], status, size)
        if self._waiting:
            self._send()


class Results:
    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.by_route: dict[str, list[float]] = {name: [] for name in ORDER}
        self.statuses: Counter[str] = Counter()
        self.bytes = 0
        self.broken = 0
        self.since = 0.0

    def note(self, due: float, route: str, status: int, size: int) -> None:
        if due < self.since:  # the warm-up
            return
        seconds = time.perf_counter() - due
        self.latencies.append(seconds)
        self.by_route[route].append(seconds)
        self.statuses[f"{route} {status}"] += 1
        self.bytes += size


async def generate(plan: dict[str, Any]) -> dict[str, Any]:
    """Ask at the planned rate; how it went."""
    loop, results = asyncio.get_running_loop(), Results()
    clients = []
    for cookie, paths in plan["clients"]:
        _, client = await loop.create_connection(
            lambda cookie=cookie, paths=paths: Client(cookie, paths, results), "127.0.0.1", plan["port"]
        )
        clients.append(client)
    rate, seconds = plan["rate"], plan["seconds"]
    random.shuffle(clients)
    began = time.perf_counter() + 0.1
    results.since = began + WARM_UP_S
    for number in range(int(rate * (seconds + WARM_UP_S))):
        due = began + number / rate
        late = due - time.perf_counter()
        if late > 0:
            await asyncio.sleep(late)
        elif number % 20 == 0:
            await asyncio.sleep(0)  # behind: answers must still be read
        clients[number % len(clients)].ask(due)
    asked = int(rate * seconds)
    give_up = time.perf_counter() + 30
    while len(results.latencies) + results.broken < asked and time.perf_counter() < give_up:
        await asyncio.sleep(0.05)
    return {
        "asked": asked,
        "seconds": seconds,
        "latencies": results.latencies,
        "by_route": results.by_route,
        "statuses": dict(results.statuses),
        "bytes": results.bytes,
        "broken": results.broken,
        "own_cpu_s": time.process_time(),
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(generate(json.load(sys.stdin)))))
