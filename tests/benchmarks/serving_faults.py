"""Deployments in trouble: how soon a killed server answers again, what a flood leaves in the API's memory.

python -m tests.benchmarks.serving_faults --artifact FOLDER     kills its server amid streams
python -m tests.benchmarks.serving_faults                       floods a stand-in that takes four requests
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.benchmarks.serving import KEY, NAME, REAL, STAND_IN, Stack, stack

HEADERS = {"Authorization": f"Bearer {KEY}"}
AGAIN_S = 0.1
LIMIT_S = 120


def server_process() -> psutil.Process | None:
    """The inference server below this process."""
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            if "workers.serving" in process.cmdline():
                return process
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return None


def seconds_to_recover(client: httpx.Client) -> None:
    """Kill the server amid a stream; print when the error came, and when the next request was answered."""
    body = {"model": NAME, "prompt": "The city", "temperature": 0, "ignore_eos": True}
    victim = server_process()
    assert victim is not None
    with client.stream("POST", "/v1/completions", json=body | {"max_tokens": 900, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        victim.kill()
        began = time.monotonic()
        events = [line.removeprefix("data: ") for line in lines if line]
    told_s = time.monotonic() - began
    code = json.loads(events[-2])["error"]["code"]
    while (status := client.post("/v1/completions", json=body | {"max_tokens": 1}).status_code) != 200:
        assert status == 503
        if time.monotonic() - began > LIMIT_S:
            raise SystemExit(f"no answer after {LIMIT_S} s")
        time.sleep(AGAIN_S)
    recovered_s = time.monotonic() - began
    started = server_process()
    assert started is not None
    times = started.cpu_times()
    print(
        f"{code} after {told_s:.2f} s; answered again after {recovered_s:.2f} s, "
        f"of which the new server computed {times.user + times.system:.2f} s",
        flush=True,
    )


def recovery(artifact: Path, repeats: int) -> None:
    files = {path.relative_to(artifact).as_posix(): path.read_bytes()
             for path in artifact.rglob("*") if path.is_file()}  # fmt: skip
    with (
        stack(REAL, files) as running,
        httpx.Client(base_url=running.api, headers=HEADERS, timeout=LIMIT_S) as client,
    ):
        for _ in range(repeats):
            seconds_to_recover(client)


async def wave(running: Stack, count: int, at_once: int) -> Counter[int]:
    """Statuses of `count` requests of 20 kB."""
    body: dict[str, Any] = {"model": NAME, "prompt": "x" * 20_000, "tokens": 20, "pause": 0.01}
    places, statuses = asyncio.Semaphore(at_once), Counter[int]()
    async with httpx.AsyncClient(base_url=running.api, headers=HEADERS, timeout=LIMIT_S) as client:

        async def ask() -> None:
            async with places:
                answer = await client.post("/v1/completions", json=body)
            if answer.status_code != 200 and "retry-after" not in answer.headers:
                raise SystemExit(f"{answer.status_code} without Retry-After")
            statuses[answer.status_code] += 1

        await asyncio.gather(*(ask() for _ in range(count)))
    return statuses


def flood(count: int, at_once: int) -> None:
    with stack(STAND_IN, {"stand_in.json": b'{"queue": 4}'}) as running:
        for part in range(5):
            statuses = asyncio.run(wave(running, count, at_once)) if part else Counter[int]()
            resident = running.process.memory_info().rss / 2**20
            print(f"{part * count} requests: API {resident:.1f} MiB, {dict(statuses)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--repeats", type=int, default=3, help="of kills")
    parser.add_argument("--count", type=int, default=500, help="of requests in each of four waves")
    parser.add_argument("--at-once", type=int, default=100)
    options = parser.parse_args()
    if options.artifact is not None:
        recovery(options.artifact, options.repeats)
    else:
        flood(options.count, options.at_once)


if __name__ == "__main__":
    main()
