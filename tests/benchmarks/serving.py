"""Deployments under load: what the gateway adds to the first token, and tokens per second by concurrency.

    python tests/benchmarks/serving.py                          the gateway's share, with a stand-in server
    python tests/benchmarks/serving.py --artifact FOLDER        a model behind worker and gateway
    python tests/benchmarks/serving.py --url URL --model NAME --api-key KEY     a service that runs already

Each request has a prompt of `--prompt` tokens and an answer of exactly `--output` tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from app.core.records.artifact import ArtifactFile, ArtifactManifest  # noqa: E402
from app.core.records.ids import artifact_id, new_id  # noqa: E402
from app.core.records.specs import Recipe  # noqa: E402
from app.core.storage.artifact_store import file_key  # noqa: E402
from app.core.storage.object_store import ObjectStore  # noqa: E402
from app.core.storage.storage_keys import manifest_key  # noqa: E402

KEY = "benchmark-key-" + "0" * 32
NAME = "model"
WORDS = "the history of the city and its people in the early years of the century "
START_LIMIT_S = 180
WARM_UP = 20
STAND_IN = ("tests.integration.stand_in_serving_worker", "bench")
REAL = ("workers.replicas.replica_supervisor", "--device", "cpu")


@dataclass
class Timing:
    """One request: seconds to the first token, gaps between tokens, tokens."""

    first_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0


class Stack(NamedTuple):
    """Addresses of the API and of the only server behind it, and the API's process."""

    api: str
    server: str
    process: psutil.Process

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def stack(worker: Sequence[str], files: dict[str, bytes]) -> Iterator[Stack]:
    """An API process and a worker that serves an artifact of these files."""
    with tempfile.TemporaryDirectory() as state, ExitStack() as processes, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        environment = {**os.environ, "NIBBLE_STATE_DIR": state, "NIBBLE_PORT": str(port),
                       "NIBBLE_BOOTSTRAP_API_KEY": KEY, "NIBBLE_INFERENCE_LIMIT": "1000"}  # fmt: skip
        log = processes.enter_context((Path(state) / "log").open("wb"))
        url = f"http://127.0.0.1:{port}"
        started: list[psutil.Process] = []
        for command in (("app.cli", "api"), worker):
            process = subprocess.Popen(
                [sys.executable, "-m", *command], env=environment, cwd=REPOSITORY, stdout=log, stderr=log
            )
            started.append(psutil.Process(process.pid))
            processes.callback(process.wait)
            processes.callback(process.terminate)
            wait_for(lambda: httpx.get(f"{url}/readyz").status_code == 200)
            # The API runs a Redis of its own, which the worker shares.
            environment["NIBBLE_REDIS_URL"] = f"unix://{state}/redis/redis.sock"
        artifact = publish(Path(state) / "storage", files)
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
            made = client.post("/v1/deployments", json={"artifact": artifact, "name": NAME}).json()
            route = f"/v1/deployments/{made['id']}"
            wait_for(lambda: client.get(route).json()["state"] == "ready")
            wait_for(lambda: client.get("/v1/models").json()["data"][0]["max_model_len"] is not None)
        reports = [
            line for line in (Path(state) / "log").read_text().splitlines() if '"ready", "port"' in line
        ]
        server = int(json.loads(reports[-1][reports[-1].index("{") :])["port"])
        yield Stack(url, f"http://127.0.0.1:{server}", started[0])


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            if condition():
                return
        except (httpx.TransportError, KeyError, IndexError):
            pass
        if time.monotonic() > deadline:
            raise SystemExit("the service did not start")
        time.sleep(0.1)


def publish(storage: Path, files: dict[str, bytes]) -> str:
    """An artifact as a worker would have published it."""
    objects, job = ObjectStore(storage.as_uri()), new_id("job")
    manifest = ArtifactManifest(
        id=artifact_id(job, 0, "compressed-tensors"), tenant="default", job=job, created_at=datetime.now(UTC),
        model="benchmark", model_digest="0" * 64, recipe=Recipe(), format="compressed-tensors",
        prefix="attempt-1",
        files=tuple(ArtifactFile(path=path, size=len(content), sha256=sha256(content).hexdigest())
                    for path, content in files.items()),
    )  # fmt: skip
    for path, content in files.items():
        objects.put(file_key(manifest, path), content)
    objects.create(manifest_key(manifest.id), manifest.model_dump_json().encode())
    return manifest.id


def request_body(options: argparse.Namespace) -> dict[str, Any]:
    """About `prompt` tokens, for a model whose words are about a token each."""
    words = (WORDS * (options.prompt // 14 + 1)).split()[: options.prompt]
    return {"model": options.model, "prompt": " ".join(words), "max_tokens": options.output,
            "tokens": options.output, "temperature": 0, "ignore_eos": True, "stream": True}  # fmt: skip


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Timing:
    timing, last = Timing(), time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            raise SystemExit(f"{answer.status_code}: {answer.text}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line.endswith("[DONE]"):
                continue
            now = time.perf_counter()
            if timing.tokens == 0:
                timing.first_s = now - last
            else:
                timing.gaps_s.append(now - last)
            timing.tokens += 1
            last = now
    return timing


async def load(url: str, options: argparse.Namespace, concurrency: int) -> tuple[float, list[Timing]]:
    """Seconds and timings of `concurrency` callers who each ask again as soon as they are answered."""
    headers = {"Authorization": f"Bearer {options.api_key}"}
    body, timings = request_body(options), []
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=httpx.Limits()) as client:
        await ask(client, body)  # what happens once is not measured

        async def caller() -> None:
            for _ in range(options.requests):
                timings.append(await ask(client, body))

        started = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(concurrency)))
        return time.perf_counter() - started, timings


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def report(url: str, options: argparse.Namespace) -> None:
    print(f"prompt {options.prompt}, output {options.output} tokens, {options.requests} requests per caller")
    print("| concurrency | tokens/s | first token p50 | p99 | between tokens p50 | p99 |")
    print("|---|---|---|---|---|---|")
    for concurrency in options.concurrency:
        seconds, timings = asyncio.run(load(url, options, concurrency))
        firsts = [timing.first_s for timing in timings]
        gaps = [gap for timing in timings for gap in timing.gaps_s]
        # Chunks may hold several tokens; every answer has exactly as many as were asked for.
        rate = options.output * len(timings) / seconds
        figures = [
            percentile(firsts, 0.5),
            percentile(firsts, 0.99),
            percentile(gaps, 0.5),
            percentile(gaps, 0.99),
        ]
        cells = " | ".join(f"{figure * 1e3:.1f} ms" for figure in figures)
        print(f"| {concurrency} | {rate:.0f} | {cells} |", flush=True)


async def first_tokens(running: Stack, body: dict[str, Any], count: int) -> dict[str, list[float]]:
    """Times to the first token over the gateway and straight from the server, in turn."""
    found: dict[str, list[float]] = {"gateway": [], "server": []}
    headers = {"Authorization": f"Bearer {KEY}"}
    async with (
        httpx.AsyncClient(base_url=running.api, headers=headers, timeout=60) as over,
        httpx.AsyncClient(base_url=running.server, timeout=60) as straight,
    ):
        for turn in range(count + WARM_UP):
            for name, client in (("gateway", over), ("server", straight)):
                timing = await ask(client, body)
                if turn >= WARM_UP:  # the first ones open connections and fill caches
                    found[name].append(timing.first_s)
    return found


def overhead(options: argparse.Namespace) -> None:
    with stack(STAND_IN, {"stand_in.json": b"{}"}) as running:
        idle_s, began = running.cpu_s(), time.monotonic()
        time.sleep(5)
        idle_rate = (running.cpu_s() - idle_s) / (time.monotonic() - began)
        used_s, began = running.cpu_s(), time.monotonic()
        found = asyncio.run(first_tokens(running, request_body(options), options.count))
        used_s = running.cpu_s() - used_s - idle_rate * (time.monotonic() - began)
    print(f"time to the first token, {options.count} requests each, stand-in server")
    for name, times in found.items():
        print(
            f"{name:8} p50 {percentile(times, 0.5) * 1e3:.2f} ms  p99 {percentile(times, 0.99) * 1e3:.2f} ms"
        )
    added = statistics.median(found["gateway"]) - statistics.median(found["server"])
    print(f"the gateway adds {added * 1e3:.2f} ms at p50")
    each = used_s / (options.count + WARM_UP) * 1e3
    print(f"its process takes {each:.2f} ms of CPU time per request of {options.output} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--url")
    parser.add_argument("--model", default=NAME)
    parser.add_argument("--api-key", default=KEY)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--requests", type=int, default=4, help="of each caller")
    parser.add_argument("--count", type=int, default=300, help="of requests for the gateway's share")
    options = parser.parse_args()
    if options.url is not None:
        report(options.url, options)
    elif options.artifact is not None:
        files = {path.relative_to(options.artifact).as_posix(): path.read_bytes()
                 for path in options.artifact.rglob("*") if path.is_file()}  # fmt: skip
        with stack(REAL, files) as running:
            report(running.api, options)
    else:
        overhead(options)


if __name__ == "__main__":
    main()
