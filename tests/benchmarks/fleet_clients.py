"""The balancer and the callers of the fleet benchmark, as a process: a plan on stdin, how it went on stdout.

The balancer knows nothing of HTTP: each new connection goes to the next server. Callers keep theirs: one
of each tenant submits when its jobs are due, one shows pages of lists as a dashboard polls them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections import Counter, defaultdict
from itertools import cycle
from typing import Any

PAGES = {
    "jobs": "/v1/jobs?limit=25&view=brief",
    "running": "/v1/jobs?limit=25&view=brief&state=running",
    "failed": "/v1/jobs?limit=25&view=brief&state=failed",
    "artifacts": "/v1/artifacts?limit=25",
    "workers": "/v1/workers",
}
SCRAPE_S = 15.0


class Balancer:
    """Passes bytes between callers and servers."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = cycle(ports)
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> int:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return int(server.sockets[0].getsockname()[1])

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection("127.0.0.1", next(self._ports))
        for source, target in ((reader, other_writer), (other_reader, writer)):
            task = asyncio.create_task(self._pump(source, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await source.read(1 << 16):
                target.write(piece)
                await target.drain()
        target.close()


class Caller:
    """One kept connection over the balancer."""

    def __init__(self, port: int, key: str) -> None:
        self._port, self._key = port, key
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: str = "") -> tuple[int, bytes]:
        """Status and body of the answer; again on a new connection if the kept one has been closed."""
        for _ in range(2):
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                return await self._exchange(method, path, body)
            except (ConnectionError, asyncio.IncompleteReadError):
                self._streams = None
        raise ConnectionError(f"{method} {path} got no answer twice")

    async def _exchange(self, method: str, path: str, body: str) -> tuple[int, bytes]:
        assert self._streams is not None
        reader, writer = self._streams
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {self._key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        return int(head.split(b" ", 2)[1]), await reader.readexactly(int(length or b"0"))


class Callers:
    """Everyone who calls, and how it went."""

    def __init__(self, plan: dict[str, Any], port: int) -> None:
        self._plan, self._port = plan, port
        self._statuses: Counter[str] = Counter()
        self._latencies: dict[str, list[float]] = defaultdict(list)
        self._began = 0.0
        self._submitted = asyncio.Event()

    async def run(self) -> dict[str, Any]:
        self._began = time.perf_counter() + 0.2
        polls = [asyncio.create_task(self._poll(key)) for key in self._plan["keys"].values()]
        scrapes = [asyncio.create_task(self._scrape(port)) for port in self._plan["ports"]]
        try:
            await asyncio.gather(*(self._submit(*each) for each in self._plan["arrivals"].items()))
            print(json.dumps({"submitted": True}), flush=True)
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, sys.stdin.readline)  # until all jobs have ended
        finally:
            for task in (*polls, *scrapes):
                if task.done():
                    task.result()  # a refused poll ends the measurement
                task.cancel()
        return {"statuses": self._statuses, "latencies": self._latencies, "cpu_s": time.process_time()}

    async def _timed(self, caller: Caller, name: str, method: str, path: str, body: str = "") -> None:
        began = time.perf_counter()
        status, content = await caller.ask(method, path, body)
        if status >= 400:
            raise RuntimeError(f"{method} {path}: {status} {content.decode()[:500]}")
        self._latencies[name].append(time.perf_counter() - began)
        self._statuses[f"{name} {status}"] += 1

    async def _submit(self, tenant: str, moments: list[float]) -> None:
        caller = Caller(self._port, self._plan["keys"][tenant])
        for moment in moments:
            await asyncio.sleep(max(0.0, self._began + moment - time.perf_counter()))
            await self._timed(caller, "submit", "POST", "/v1/jobs", self._plan["body"])

    async def _poll(self, key: str) -> None:
        caller = Caller(self._port, key)
        for name in cycle(PAGES):
            await asyncio.sleep(self._plan["poll_s"])
            await self._timed(caller, name, "GET", PAGES[name])

    async def _scrape(self, port: int) -> None:
        """As Prometheus does: each API by itself."""
        caller = Caller(port, "")
        while True:
            await self._timed(caller, "metrics", "GET", "/metrics")
            await asyncio.sleep(SCRAPE_S)


async def main() -> None:
    plan = json.loads(sys.stdin.readline())
    port = await Balancer(plan["ports"]).open()
    print(json.dumps(await Callers(plan, port).run()))


if __name__ == "__main__":
    asyncio.run(main())
