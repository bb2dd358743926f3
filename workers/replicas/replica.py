"""Keeps one replica alive, in a thread: files, server, load, restarts, and an end that finishes requests.

The thread writes to Redis only through the supervisor, which publishes `replica` with every heartbeat.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx

from app.core.deployments.deployment import Deployment, Replica, ReplicaState
from app.core.deployments.originals import not_for_vllm
from app.core.errors import InvalidRequest, NibbleError, NotFound
from app.core.records.job import Problem
from app.core.settings import Settings
from app.core.storage.artifact_store import ArtifactStore
from workers.attempts.faults import disk_fault
from workers.replicas.artifact_cache import ArtifactCache
from workers.replicas.served_files import ServedFiles, served_files
from workers.replicas.server_process import (
    SERVER_MODULE,
    Launch,
    ServerEnded,
    ServerProcess,
    ServerRefused,
    start_server,
)

log = logging.getLogger(__name__)

TICK_S = 0.2
LOAD_S = 1.0  # between two looks at a server's load
MAX_SILENT = 6  # looks in a row without an answer, of up to 5 s each, after which a server counts as hung
MAX_FAILURES = 5  # in a row before readiness; a server that lived STEADY_S ends the row
STEADY_S = 60.0
BACKOFF_S = (0.0, 1.0, 2.0, 4.0, 8.0)
STOP_MARGIN_S = 5.0  # beyond its own limit for draining


@dataclass(frozen=True)
class ServingContext:
    """Settings, stores and caches that the replicas of a worker share."""

    settings: Settings
    artifacts: ArtifactStore
    cache: ArtifactCache
    host: str  # that servers bind and are reached at
    device: str
    server_module: str = SERVER_MODULE


class Stopping(Exception):
    """The replica must stop."""


class ReplicaKeeper(threading.Thread):
    """One replica from claim to release. `failure` is set if no server can be had."""

    def __init__(self, context: ServingContext, deployment: Deployment, replica: Replica) -> None:
        super().__init__(name=f"replica {deployment.spec.name}/{replica.slot}", daemon=True)
        self.deployment = deployment
        self.replica = replica
        self.failure: Problem | None = None
        self.load_s: float | None = None
        self._context = context
        self._stop_requested = threading.Event()
        self._drain_s = context.settings.drain_s
        self._notice_s = 0.0
        self._failures = 0

    @property
    def slot(self) -> tuple[str, int]:
        return self.deployment.id, self.replica.slot

    def stop(self, *, drain_s: float | None = None, notice_s: float = 0.0) -> None:
        """Finish running requests, for at most `drain_s` seconds, then end.

        For `notice_s` more seconds new requests are answered too: those of gateways that have not read yet
        that it ends.
        """
        if drain_s is not None:
            self._drain_s = drain_s
        if not self._stop_requested.is_set():
            self._notice_s = notice_s
            self._stop_requested.set()

    def run(self) -> None:
        work_folder = self._context.settings.scratch_dir / f"serve-{self.deployment.id}-{self.replica.slot}"
        try:
            shutil.rmtree(work_folder, ignore_errors=True)
            work_folder.mkdir(parents=True, mode=0o700)
            self._keep(work_folder)
        except Stopping:
            log.info("%s stops", self.name)
        except NibbleError as fault:
            self._fail(fault)
        except OSError as fault:
            self._fail(disk_fault(fault))
        finally:
            shutil.rmtree(work_folder, ignore_errors=True)

    def _keep(self, work_folder: Path) -> None:
        """Fetch, then start the server repeatedly. Raises errors that another start can't fix."""
        while True:
            try:
                with self._files() as files:
                    self._choose_engine(files)
                    self._serve(self._launch(files, work_folder))
            except (NotFound, InvalidRequest, ServerRefused):
                raise
            except NibbleError as fault:
                self._note_failure(fault)

    def _note_failure(self, fault: NibbleError) -> None:
        """Wait before the next start; raise the fault if too many servers never became ready."""
        self._failures += 1
        log.warning("%s: %s (failure %d)", self.name, fault.message, self._failures)
        if self._failures > MAX_FAILURES:
            if not self.replica.is_ready:
                raise fault
            self._failures = MAX_FAILURES  # it can be had: whatever ends it again and again may go away
        self._publish(
            ReplicaState.RESTARTING,
            url=None,
            running=0,
            waiting=0,
            note=fault.message,
            restarts=self.replica.restarts + 1,
        )
        self._pause(BACKOFF_S[self._failures - 1])

    def _files(self) -> AbstractContextManager[ServedFiles]:
        if self.replica.restarts == 0:
            self._publish(ReplicaState.FETCHING)
        context = self._context
        return served_files(self.deployment, context.artifacts, context.cache, context.settings, self._check)

    def _choose_engine(self, files: ServedFiles) -> None:
        """Take our own engine where vLLM can't serve the files. Raises ModelRefused if vLLM was asked for."""
        if self.replica.engine == "transformers" or files.why_own is None:
            return
        if self.deployment.spec.engine == "vllm":
            raise not_for_vllm(files.why_own)
        self.replica = self.replica.model_copy(update={"engine": "transformers"})

    def _launch(self, files: ServedFiles, work_folder: Path) -> Launch:
        settings, spec = self._context.settings, self.deployment.spec
        return Launch(
            files=files,
            work_folder=work_folder,
            name=spec.name,
            host=self._context.host,
            device=self._context.device,
            kernel_backend=settings.kernel_backend,
            drain_s=settings.drain_s,
            options=spec.served,
            module=self._context.server_module,
        )

    def _serve(self, launch: Launch) -> None:
        """Run a server until it ends by itself (ServerEnded) or this replica must (Stopping)."""
        self._publish(ReplicaState.LOADING, note=self.replica.note)
        started = time.monotonic()
        with start_server(self.replica.engine, launch) as server:
            try:
                self._await_ready(server, started)
                self.load_s = time.monotonic() - started
                self._publish(
                    ReplicaState.READY, url=server.url, note="", max_model_len=server.max_model_len()
                )
                self._watch(server)
            except Stopping:
                self._drain(server)
                raise

    def _drain(self, server: ServerProcess) -> None:
        """Let running requests end, then the server, whatever its engine does with them at the signal."""
        has_callers = self.replica.is_ready
        self._publish(ReplicaState.DRAINING)
        began = time.monotonic()
        if has_callers:
            time.sleep(self._notice_s)
            with contextlib.suppress(httpx.HTTPError):
                while self._note_load(server) and time.monotonic() - began < self._notice_s + self._drain_s:
                    time.sleep(TICK_S)
        left_s = max(0.0, self._notice_s + self._drain_s - (time.monotonic() - began))
        server.stop(left_s + STOP_MARGIN_S)

    def _note_load(self, server: ServerProcess) -> int:
        """Requests that run or wait. Raises httpx.HTTPError if the server does not answer."""
        load = server.load()
        self.replica = self.replica.model_copy(update=load._asdict())
        return load.running + load.waiting

    def _await_ready(self, server: ServerProcess, started: float) -> None:
        limit_s = self._context.settings.load_limit_s
        while not server.is_ready():
            server.check()
            if time.monotonic() - started > limit_s:
                raise ServerEnded(
                    f"the inference server was not ready after {limit_s:.0f} s",
                    code="server_load_limit",
                    remedy="raise NIBBLE_LOAD_LIMIT_S if the model needs longer",
                )
            self._pause(TICK_S)

    def _watch(self, server: ServerProcess) -> None:
        """Follow the load. Raises ServerEnded when the server is gone or hung."""
        ready, looked, silent = time.monotonic(), 0.0, 0
        while True:
            self._pause(TICK_S)
            server.check()
            now = time.monotonic()
            if now - ready > STEADY_S:
                self._failures = 0
            if now - looked < LOAD_S:
                continue
            try:
                self._note_load(server)
            except httpx.HTTPError as fault:
                silent += 1
                log.warning("%s does not answer: %s", self.name, fault)
                if silent >= MAX_SILENT:
                    raise ServerEnded("the inference server hung", code="server_hung") from fault
            else:
                silent = 0
            looked = time.monotonic()

    def _publish(self, state: ReplicaState, **changes: object) -> None:
        now = datetime.now(UTC)
        self.replica = self.replica.model_copy(update={"state": state, "since": now, **changes})

    def _check(self) -> None:
        if self._stop_requested.is_set():
            raise Stopping

    def _pause(self, seconds: float) -> None:
        if self._stop_requested.wait(seconds):
            raise Stopping

    def _fail(self, fault: NibbleError) -> None:
        log.error("%s: %s [%s]", self.name, fault.message, fault.code)
        self.failure = Problem.of(fault)
