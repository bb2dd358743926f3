"""The process of one inference server: its command line, readiness, load and end.

Engine `transformers` is our own server, which reports over a pipe. Engine `vllm` is an installed vLLM, which
is ready when its /health answers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from app.core.child.confinement import child_environment
from app.core.child.owned_process import OwnedProcess, exit_words
from app.core.errors import NibbleError
from app.core.records.serving_options import ServerOptions, VllmOptions
from workers.replicas.served_files import ServedFiles

log = logging.getLogger(__name__)

SERVER_MODULE = "workers.serving"
PROBE_LIMIT_S = 5.0
# Environment variables that vLLM reads, besides those that every child gets.
VLLM_PREFIXES = ("VLLM_", "NCCL_", "GLOO_", "RAY_", "TORCH_", "TRITON_")
# GiB. Else vLLM wants 0.92 of the memory where it computes on the CPU: no two servers could have that.
VLLM_CPU_CACHE = {"VLLM_CPU_KVCACHE_SPACE": "4"}
VLLM_KEY = "VLLM_API_KEY"  # with it vLLM would refuse the gateway, which has checked the caller's own key
LOAD = re.compile(r"^vllm:num_requests_(running|waiting)(?:\{[^}]*\})? ([0-9.e+]+)$", re.MULTILINE)


class ServerRefused(NibbleError):
    """The server said that it can't serve this artifact: starting it again would change nothing."""

    code = "server_refused"


class ServerEnded(NibbleError):
    """The server ended by itself."""

    code = "server_crashed"


class ServerLoad(NamedTuple):
    running: int
    waiting: int


class Launch(NamedTuple):
    """The settings that a server is started with."""

    files: ServedFiles
    work_folder: Path  # for temporary files
    name: str
    host: str
    device: str
    kernel_backend: str
    drain_s: float
    options: ServerOptions
    module: str = SERVER_MODULE


class ServerProcess(OwnedProcess):
    """A running server."""

    def __init__(
        self, words: Sequence[str], environment: dict[str, str], *, fds: tuple[int, ...] = ()
    ) -> None:
        self.url: str | None = None
        self._http = httpx.Client(timeout=PROBE_LIMIT_S, trust_env=False)
        super().__init__(words, environment=environment, fds=fds, on_line=self._log_line)

    def is_ready(self) -> bool:
        """Whether it answers at `url`. Raises ServerRefused if it reports that it can't."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ServerEnded if the process is gone."""
        code = self.exit_code()
        if code is not None:
            self.close()  # its last lines are read
            last = " | ".join(line.strip() for line in self.output_tail().splitlines()[-5:])[-1000:] or "none"
            raise ServerEnded(self.cause(code), remedy=f"read the worker's log; its last lines: {last}")

    def cause(self, code: int) -> str:
        if self.memory_ran_out():
            return "the inference server was killed because memory ran out"
        return f"the inference server ended with {exit_words(code)}"

    def load(self) -> ServerLoad:
        """Its running and waiting requests. Raises httpx.TransportError if it does not answer."""
        counts = {"running": 0.0, "waiting": 0.0}
        for kind, value in LOAD.findall(self._http.get(f"{self.url}/metrics").text):
            counts[kind] += float(value)
        return ServerLoad(int(counts["running"]), int(counts["waiting"]))

    def max_model_len(self) -> int | None:
        """The longest sequence it takes, as it says itself."""
        try:
            models: Any = self._http.get(f"{self.url}/v1/models").json()
            return int(models["data"][0]["max_model_len"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError):
            return None

    def close(self) -> None:
        super().close()
        self._http.close()

    def _log_line(self, line: str) -> None:
        log.info("server %d: %s", self.pid, line)


class OwnServer(ServerProcess):
    """`python -m workers.serving`: the engine `transformers`."""

    def __init__(self, launch: Launch) -> None:
        self._host = launch.host
        self._buffered = b""
        self._reports, reports_end = os.pipe()
        os.set_blocking(self._reports, False)
        words = [
            *(launch.module, "--artifact", str(launch.files.folder), "--name", launch.name),
            *("--host", launch.host, "--port", "0", "--device", launch.device),
            *("--kernel-backend", launch.kernel_backend, "--drain-s", str(launch.drain_s)),
            *("--ready-fd", str(reports_end)),
            *original_arguments(launch.files),
            *own_arguments(launch.options),
        ]
        try:
            super().__init__(words, child_environment(os.environ, launch.work_folder), fds=(reports_end,))
        finally:
            os.close(reports_end)

    def is_ready(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            self._buffered += os.read(self._reports, 1 << 16)
        *lines, self._buffered = self._buffered.split(b"\n")
        for line in lines:
            self._hear(line)
        return self.url is not None

    def _hear(self, line: bytes) -> None:
        try:
            report: Any = json.loads(line)
            kind = report["kind"]
        except (ValueError, KeyError, TypeError):
            log.warning("server %d: %r is no report", self.pid, line[:200])
            return
        if kind == "failed":
            raise ServerRefused(
                str(report.get("message", "the server can't serve this artifact")),
                code=str(report.get("code", ServerRefused.code)),
                remedy=str(report.get("remedy", "")),
            )
        log.info("server %d: %s", self.pid, line.decode(errors="replace")[:2000])
        if kind == "ready":
            self.url = f"http://{self._host}:{int(report['port'])}"

    def close(self) -> None:
        super().close()
        if self._reports >= 0:
            os.close(self._reports)
            self._reports = -1


class VllmServer(ServerProcess):
    """`vllm serve`, for many GPUs or hosts."""

    def __init__(self, launch: Launch) -> None:
        program = vllm_program()
        if program is None:
            raise vllm_missing()
        port = free_port(launch.host)
        self._address = f"http://{launch.host}:{port}"
        # vLLM names its Unix sockets by UUIDs. Among the server's other temporary files their paths could be
        # longer than the 107 characters that a socket's may have.
        self._sockets = tempfile.TemporaryDirectory(prefix="nibble-")
        words = [
            *("app.core.child.parent_guard", program, "serve", str(launch.files.folder)),
            *("--served-model-name", launch.name, "--host", launch.host, "--port", str(port)),
            *vllm_arguments(launch.options.for_vllm),
        ]
        super().__init__(words, {"VLLM_RPC_BASE_PATH": self._sockets.name} | vllm_environment(launch))

    def is_ready(self) -> bool:
        try:
            if self._http.get(f"{self._address}/health").status_code == httpx.codes.OK:
                self.url = self._address
        except httpx.TransportError:
            return False
        return self.url is not None

    def close(self) -> None:
        super().close()
        self._sockets.cleanup()


def start_server(engine: str, launch: Launch) -> ServerProcess:
    return VllmServer(launch) if engine == "vllm" else OwnServer(launch)


def vllm_program() -> str | None:
    """The `vllm` command: beside this interpreter, or on PATH; None if it is not installed."""
    beside = Path(sys.executable).with_name("vllm")
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("vllm")


def vllm_missing() -> ServerRefused:
    return ServerRefused(
        "vllm is not installed on this worker",
        code="vllm_not_installed",
        remedy="install vllm beside the worker, or deploy with engine transformers",
    )


def own_arguments(options: ServerOptions) -> list[str]:
    """The options in our own server's spelling; its defaults hold for absent ones."""
    chosen = {
        "--dtype": options.dtype,
        "--max-model-len": options.max_model_len,
        "--max-sequences": options.max_num_seqs,
        "--cache-share": options.cache_share,
    }
    return [word for flag, value in chosen.items() if value is not None for word in (flag, str(value))]


def original_arguments(files: ServedFiles) -> list[str]:
    """How our own server reads the files of an original."""
    if not files.is_original:
        return []
    return ["--original", *([] if files.adapter is None else ["--adapter", str(files.adapter)])]


def vllm_arguments(options: VllmOptions) -> list[str]:
    """The options in vLLM's spelling; only names of the record's fields occur."""
    arguments = ["--enable-auto-tool-choice"] if options.tool_call_parser is not None else []
    for name, value in options.model_dump(exclude_none=True).items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            arguments.append(flag)
        elif value is False and name == "enable_prefix_caching":
            arguments.append("--no-enable-prefix-caching")
        elif value is not False:
            arguments += [flag, str(value)]
    return arguments


def vllm_environment(launch: Launch) -> dict[str, str]:
    """As every child's, with vLLM's own variables, and the GPUs from this worker's on."""
    options = launch.options.for_vllm
    environment = child_environment(os.environ, launch.work_folder)
    if launch.device == "cpu" and options.gpu_memory_utilization is None:
        environment |= VLLM_CPU_CACHE
    environment |= {name: value for name, value in os.environ.items() if name.startswith(VLLM_PREFIXES)}
    environment.pop(VLLM_KEY, None)
    count = (options.tensor_parallel_size or 1) * (options.pipeline_parallel_size or 1)
    if launch.device.startswith("cuda:") and options.distributed_executor_backend != "ray" and count == 1:
        environment["CUDA_VISIBLE_DEVICES"] = launch.device.removeprefix("cuda:")
    return environment


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
