"""The API process: seconds until it answers, and resident memory after load.

python tests/benchmarks/service.py
"""

from __future__ import annotations

import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
STARTS = 5
REQUESTS = 200
LIMIT_S = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(state: str) -> tuple[float, float]:
    """Seconds from the process's start to a ready answer, and MiB after `REQUESTS` requests."""
    port = free_port()
    key = "nib_benchmark_" + "0" * 32
    environment = {
        **os.environ,
        "NIBBLE_STATE_DIR": state,
        "NIBBLE_PORT": str(port),
        "NIBBLE_BOOTSTRAP_API_KEY": key,
        "NIBBLE_MODEL_ROOTS": str(REPOSITORY / "examples"),
    }
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "app.cli", "api"], env=environment, cwd=REPOSITORY)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            while not is_ready(client):
                assert time.perf_counter() - started < LIMIT_S, "the API does not become ready"
                time.sleep(0.01)
            seconds = time.perf_counter() - started
            headers = {"Authorization": f"Bearer {key}"}
            body = {"model": (REPOSITORY / "examples" / "wikitext-llama-6m").as_uri()}
            for _ in range(REQUESTS):
                client.post("/v1/estimates", json=body, headers=headers).raise_for_status()
                client.get("/v1/jobs", headers=headers).raise_for_status()
        return seconds, psutil.Process(process.pid).memory_info().rss / 2**20
    finally:
        process.terminate()
        process.wait()


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def main() -> None:
    print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as state:
        measured = [measure(state) for _ in range(STARTS)]
    seconds, memory = statistics.median(s for s, _ in measured), max(m for _, m in measured)
    print(f"start to ready: median {seconds:.2f} s, of 2 s allowed: {seconds / 2:.2f}")
    share = memory * 2**20 / 150e6
    print(f"resident after {2 * REQUESTS} requests: {memory:.0f} MiB, of 150 MB allowed: {share:.2f}")


if __name__ == "__main__":
    main()
