"""New connections beside a flood of kept ones, at the API and at a bare uvicorn.

Part of the polling benchmark. Each kept connection asks again as soon as it is answered; meanwhile newcomers
connect, ask once and go. A bare application under the same flood tells how much of it is uvicorn's nature.
Server, flood and newcomers are processes of their own.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.benchmarks.service import REPOSITORY, free_port

SETTLE_S = 2.0  # the flood alone
PAUSE_S = 0.5  # between two newcomers to one address
LIMIT_S = 60.0


async def answer(request: Request) -> JSONResponse:
    return JSONResponse({"status": "ok", "padding": "x" * 1500})  # about a job's size


bare = Starlette(routes=[Route("/{path:path}", answer)])


@contextmanager
def bare_uvicorn() -> Iterator[int]:
    """The port of an application that does nothing, served as uvicorn does by itself."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "uvicorn", "tests.benchmarks.polling_newcomers:bare", "--http", "h11"),
        *("--port", str(port), "--no-access-log", "--log-level", "warning"),
    ]
    with subprocess.Popen(command, cwd=REPOSITORY) as process:
        try:
            while not answers(port):
                assert process.poll() is None, "uvicorn did not start"
                time.sleep(0.05)
            yield port
        finally:
            process.terminate()


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@dataclass(frozen=True)
class Flood:
    """Who asks what: `connections` kept ones, for `seconds`."""

    port: int
    path: str
    cookie: str
    connections: int
    seconds: float


async def pour(flood: Flood) -> None:
    """Tell when the flood has settled, and at its end how many requests were answered each second."""
    counts = [0] * flood.connections
    kept = [asyncio.create_task(ask_for_ever(flood, counts, number)) for number in range(flood.connections)]
    await asyncio.sleep(SETTLE_S)
    print("settled", flush=True)
    began, before = time.perf_counter(), sum(counts)
    await asyncio.sleep(flood.seconds)
    print((sum(counts) - before) / (time.perf_counter() - began))
    for task in kept:
        task.cancel()
    await asyncio.gather(*kept, return_exceptions=True)


def measured(flood: Flood, urls: list[str]) -> tuple[float, list[list[float]]]:
    """The flood's requests each second, and what newcomers to each URL waited meanwhile.

    A newcomer that starves is answered when the flood ends: its wait is a lower bound.
    """
    command = [sys.executable, "-m", "tests.benchmarks.polling_newcomers", json.dumps(asdict(flood))]
    with (
        subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as source,
        ThreadPoolExecutor(len(urls)) as pool,
    ):
        assert source.stdout is not None
        assert source.stdout.readline() == "settled\n"
        waits = list(pool.map(lambda url: arrive(url, flood.seconds - PAUSE_S), urls))
        return float(source.stdout.read()), waits


def arrive(url: str, seconds: float) -> list[float]:
    """Seconds that each of several new connections waited for its answer."""
    waits, deadline = [], time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        began = time.perf_counter()
        with urllib.request.urlopen(url, timeout=LIMIT_S) as answered:
            answered.read()
        waits.append(time.perf_counter() - began)
        time.sleep(PAUSE_S)
    return waits


async def ask_for_ever(flood: Flood, counts: list[int], number: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", flood.port)
    asked = f"GET {flood.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {flood.cookie}\r\n\r\n".encode()
    try:
        while True:
            writer.write(asked)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert head.startswith(b"http/1.1 200"), head
            await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
            counts[number] += 1
    finally:
        writer.close()


def report(
    port: int, probe_port: int, client: tuple[str, list[str]], connections: int, seconds: float
) -> None:
    """Measure both servers under the same flood, one after the other, and print what was found."""
    cookie, (_, path, *_) = client
    urls = [f"http://127.0.0.1:{each}/healthz" for each in (port, probe_port)]
    own_rate, (own, probes) = measured(Flood(port, path, cookie, connections, seconds), urls)
    with bare_uvicorn() as other:
        url = f"http://127.0.0.1:{other}/healthz"
        bare_rate, (peer,) = measured(Flood(other, path, cookie, connections, seconds), [url])
    print(f"new connections beside {connections} busy ones, each asking for one job again and again:")
    print(f"  API, its port  {line(own)}; the flood gets {own_rate:.0f} answers/s")
    print(f"  API, probes    {line(probes)}")
    print(f"  bare uvicorn   {line(peer)}; the flood gets {bare_rate:.0f} answers/s")
    print(f"  ours / bare    {statistics.median(own) / statistics.median(peer):.2f} (medians)", flush=True)


def line(waits: list[float]) -> str:
    return f"median {statistics.median(waits):6.3f}, largest {max(waits):6.3f} s of {len(waits):2}"


if __name__ == "__main__":
    asyncio.run(pour(Flood(**json.loads(sys.argv[1]))))
