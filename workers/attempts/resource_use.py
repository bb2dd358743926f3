"""What the process of a job uses while it runs: memory, processor cores, and its GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

import psutil

from app.core.records.job import ResourceUse
from workers.devices.device_memory import gpu_use

EVERY_S = 2.0
MOST = 48  # samples; then each two become one, and the time between them doubles
GPU_EVERY = 5  # samples of the process for each run of the driver's program

# Memory in bytes and cores in use; with a GPU, its memory in bytes and the share of the time that it is busy.
Sample = tuple[float, ...]


def merged(samples: Sequence[Sample]) -> Sample:
    """The peaks of memory, the means of use."""
    columns = enumerate(zip(*samples, strict=True))
    return tuple(sum(values) / len(values) if column % 2 else max(values) for column, values in columns)


class SampleHistory:
    """Samples at equal distances over any time, at most MOST of them."""

    def __init__(self) -> None:
        self._began_at = datetime.now(UTC)
        self._samples: list[Sample] = []
        self._newest: list[Sample] = []  # that become one once there are `_each`
        self._each = 1

    def add(self, sample: Sample) -> ResourceUse:
        """All samples so far; the last one is of the newest alone, until its time is full."""
        self._newest.append(sample)
        columns = list(zip(*self._samples, merged(self._newest), strict=True))
        use = ResourceUse(
            began_at=self._began_at,
            every_s=EVERY_S * self._each,
            memory_bytes=tuple(int(value) for value in columns[0]),
            cpu_cores=tuple(round(value, 2) for value in columns[1]),
            gpu_memory_bytes=tuple(int(value) for value in columns[2]) if len(columns) > 2 else (),
            gpu_share=tuple(round(value, 2) for value in columns[3]) if len(columns) > 2 else (),
        )
        if len(self._newest) == self._each:
            self._samples.append(merged(self._newest))
            self._newest = []
        if len(self._samples) == MOST:
            pairs = zip(self._samples[::2], self._samples[1::2], strict=True)
            self._samples = [merged(pair) for pair in pairs]
            self._each *= 2
        return use


class ResourceSampler:
    """Looks at a process, what it started, and its device, from a thread of its own."""

    def __init__(self, pid: int, device: str) -> None:
        self.use: ResourceUse | None = None  # None until the first sample
        self._pid = pid
        self._gpu = int(device.partition(":")[2] or 0) if device.startswith("cuda") else None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="resource use", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that was seen."""
        return None if self.use is None else max(self.use.memory_bytes)

    def _run(self) -> None:
        history, gpu, count = SampleHistory(), self._gpu_sample(), 0
        before, then = process_use(self._pid)[1], time.monotonic()
        while not self._ended.wait(EVERY_S):
            count += 1
            if gpu and count % GPU_EVERY == 0:
                gpu = self._gpu_sample() or gpu
            memory, spent = process_use(self._pid)
            now = time.monotonic()
            # A process that has ended takes its seconds with it.
            cores = max(0.0, spent - before) / (now - then)
            before, then = spent, now
            if memory:
                self.use = history.add((memory, cores, *gpu))

    def _gpu_sample(self) -> Sample:
        """Memory and share of the GPU; empty without one, or where its driver says nothing."""
        return () if self._gpu is None else gpu_use(self._gpu) or ()


def process_use(pid: int) -> tuple[int, float]:
    """Resident bytes and processor seconds of a process and of what it started; zeros once it has ended."""
    memory, seconds = 0, 0.0
    try:
        first = psutil.Process(pid)
        processes = [first, *first.children(recursive=True)]
    except psutil.Error:
        return memory, seconds
    for process in processes:
        try:
            with process.oneshot():
                memory += process.memory_info().rss
                times = process.cpu_times()
                seconds += times.user + times.system
        except psutil.Error:  # it has ended just now
            continue
    return memory, seconds
