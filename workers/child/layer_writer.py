"""Finished layers to disk while the next one is searched: checkpoints, states, and the packed outputs.

One thread, in the order in which layers were finished, with a bounded queue: what waits is held in memory.
A layer counts as finished when its checkpoint is complete, so an end at any moment loses only what waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from types import TracebackType

import torch

WAITING = 2  # layers in the queue


class LayerWriter:
    """Runs tasks on one thread; on a GPU on a stream of their own, after what was launched before them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="layer-writer")
        self.free = threading.BoundedSemaphore(WAITING)
        self.running: list[Future[None]] = []

    def put(self, task: Callable[[], None]) -> None:
        """Run `task` later. Waits while the queue is full; raises what an earlier task raised."""
        self.free.acquire()
        self.check()
        launched = None
        if self.stream is not None:
            launched = torch.cuda.Event()  # type: ignore[no-untyped-call]
            launched.record(torch.cuda.current_stream(self.device))
        self.running.append(self.pool.submit(self.perform, task, launched))

    def perform(self, task: Callable[[], None], launched: torch.cuda.Event | None) -> None:
        try:
            if launched is not None:
                launched.synchronize()
            with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
                task()
        finally:
            self.free.release()

    def check(self) -> None:
        """Raise what a task raised."""
        ended = [future for future in self.running if future.done()]
        self.running = [future for future in self.running if not future.done()]
        for future in ended:
            future.result()

    def finish(self) -> None:
        """Wait for all tasks; raises what one raised."""
        for future in self.running:
            future.result()
        self.running = []

    def __enter__(self) -> LayerWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self.finish()
