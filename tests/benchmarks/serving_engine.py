"""Throughput of the inference server itself, against `transformers serve` on the original model.

    python -m tests.benchmarks.serving_engine ARTIFACT [--original FOLDER] [--threads N] [--new-tokens N]

Each server is a process with the same number of threads, and answers streams of chat requests with prompts
and answers of fixed length, at concurrency 1, 8 and 32. The servers take turns; after a warm-up the fastest
of several turns counts, for each of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

from tests.integration.inference_process import NAME, inference_server

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples" / "wikitext-llama-6m"
WORDS = "the city of the north was built on a river and in the year of the war it was held by the king "
START_S = 120


@dataclass(frozen=True)
class Load:
    """What each client asks for."""

    prompt_words: int
    new_tokens: int
    repeats: int


@dataclass
class Timing:
    """One stream: when each chunk with text came, in seconds after the request was sent."""

    chunks: list[float]
    tokens: int


async def one_request(host: str, port: int, body: dict[str, Any]) -> Timing:
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(head.encode() + content)
    timing = Timing([], 0)
    status = await reader.readline()
    assert b" 200 " in status, status + await reader.read()
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if chunk.get("usage"):
            timing.tokens = chunk["usage"]["completion_tokens"]
        if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
            timing.chunks.append(time.perf_counter() - started)
    writer.close()
    return timing


async def run(host: str, port: int, model: str, load: Load, concurrency: int) -> dict[str, float]:
    """`concurrency` clients at once: rates and latencies."""
    body = {
        "model": model, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0,
        "max_tokens": load.new_tokens,
    }  # fmt: skip
    if model == NAME:
        body["ignore_eos"] = True  # the peer refuses fields that it does not know
    words = WORDS.split()
    bodies = []
    for client in range(concurrency):
        text = " ".join(words[(client + place) % len(words)] for place in range(load.prompt_words))
        bodies.append(body | {"messages": [{"role": "user", "content": text}]})
    started = time.perf_counter()
    timings = await asyncio.gather(*(one_request(host, port, each) for each in bodies))
    seconds = time.perf_counter() - started
    first = [timing.chunks[0] for timing in timings]
    between = [b - a for timing in timings for a, b in zip(timing.chunks, timing.chunks[1:], strict=False)]
    return {
        "tokens/s": sum(timing.tokens for timing in timings) / seconds,
        "first p50 ms": 1000 * percentile(first, 50), "first p99 ms": 1000 * percentile(first, 99),
        "next p50 ms": 1000 * percentile(between, 50), "next p99 ms": 1000 * percentile(between, 99),
    }  # fmt: skip


def percentile(values: list[float], part: int) -> float:
    return values[0] if len(values) == 1 else quantiles(values, n=100, method="inclusive")[part - 1]


@dataclass(frozen=True)
class Server:
    """Something that answers chat requests on this machine."""

    title: str
    port: int
    model: str


def measure(servers: list[Server], load: Load, concurrency: int) -> dict[str, float]:
    """The best tokens per second of each server; they take turns, so that all meet the same machine."""
    best: dict[str, dict[str, float]] = {}
    for repeat in range(load.repeats + 1):
        for server in servers:
            found = asyncio.run(run("127.0.0.1", server.port, server.model, load, concurrency))
            before = best.get(server.title)
            # The first turn warms up.
            if repeat and (before is None or found["tokens/s"] > before["tokens/s"]):
                best[server.title] = found
    for title, result in best.items():
        figures = "  ".join(f"{name} {value:.1f}" for name, value in result.items())
        print(f"{title:<24} concurrency {concurrency:>2}: {figures}", flush=True)
    return {title: result["tokens/s"] for title, result in best.items()}


@contextlib.contextmanager
def transformers_serve(model: Path, threads: int, *options: str) -> Iterator[int]:
    """The peer, on the original model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [
        str(Path(sys.executable).parent / "transformers"), "serve", str(model), "--port", str(port),
        "--host", "127.0.0.1", "--device", "cpu", *options,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            time.sleep(0.5)
        yield port
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--original", type=Path, default=EXAMPLE)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt-words", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--without-peer", action="store_true")
    options = parser.parse_args()
    load = Load(options.prompt_words, options.new_tokens, options.repeats)
    threads = ("--threads", str(options.threads), "--dtype", options.dtype)
    with contextlib.ExitStack() as running:
        ours = running.enter_context(inference_server(options.artifact, *threads))
        servers = [Server("nibble", ours.messages[-1]["port"], NAME)]
        for title, peer in PEERS.items() if not options.without_peer else ():
            port = running.enter_context(transformers_serve(options.original, options.threads, *peer))
            servers.append(Server(title, port, str(options.original)))
        rates = {concurrency: measure(servers, load, concurrency) for concurrency in options.concurrency}
    print(f"concurrency 8 to 1: {rates[8]['nibble'] / rates[1]['nibble']:.2f} times the tokens per second")
    for title in PEERS if not options.without_peer else ():
        print(f"at concurrency 8: {rates[8]['nibble'] / rates[8][title]:.2f} times {title}")


# Its default answers one request after another; continuous batching needs limits on a CPU.
PEERS: dict[str, tuple[str, ...]] = {
    "transformers serve": (),
    "transformers serve CB": (
        "--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "512"
    ),
}  # fmt: skip

if __name__ == "__main__":
    main()
