"""Several devices of one host on one job: each calibrates on a share of the batches, the first gets the sums.

Rank 0 is the job child; it searches and writes. The others only pass their batches through the original
model, layer by layer, and may run ahead of it. torch.distributed adds up: NCCL on GPUs, gloo on CPUs. Sums
are the same as one device's up to the order of additions in float32.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from app.core.assignment import Assignment
from workers.quantization.input_statistics import InputCollector

PATIENCE = timedelta(hours=1)  # a rank waits while the first one searches
MODULE = "workers.calibration_rank"
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a calibration pass."""

    rank: int
    size: int

    def share(self, items: list[T]) -> list[T]:
        """The part of all batches that this process takes; the first batch is rank 0's."""
        return items[self.rank :: self.size]

    def add_up(self, collectors: list[InputCollector]) -> None:
        """Give rank 0 the sums of all; the others' are of no use any more."""
        if self.size == 1:
            return
        for collector in collectors:
            assert collector.abs_sum is not None
            assert collector.moment is not None
            count = torch.tensor(collector.num_tokens, device=collector.moment.device)
            for total in (collector.abs_sum, collector.moment, count):
                dist.reduce(total, 0)
            collector.num_tokens = int(count)


ALONE = Ranks(0, 1)


@contextmanager
def joined(rank: int, size: int, rendezvous: Path, device: torch.device) -> Iterator[Ranks]:
    """Be one of the ranks that meet at the file `rendezvous`."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=PATIENCE
    )
    try:
        yield Ranks(rank, size)
    finally:
        dist.destroy_process_group()


@contextmanager
def started(assignment: Assignment, layer: int, num_batches: int) -> Iterator[Ranks]:
    """The ranks of a job, with a process for each further device.

    A process that fails ends this one: no sum would ever be whole.
    """
    devices = (assignment.device, *assignment.calibration_devices)[: max(1, num_batches)]
    if len(devices) == 1:
        yield ALONE
        return
    with tempfile.TemporaryDirectory(dir=assignment.work_folder) as folder:
        rendezvous = Path(folder) / "rendezvous"
        others = [
            start_rank(
                assignment.model_copy(update={"device": device}), (rank, len(devices), layer), rendezvous
            )
            for rank, device in enumerate(devices)
            if rank
        ]
        try:
            with joined(0, len(devices), rendezvous, torch.device(assignment.device)) as ranks:
                yield ranks
            for process in others:
                process.wait()
        finally:
            for process in others:
                process.kill()
                process.wait()


def start_rank(
    assignment: Assignment, place: tuple[int, int, int], rendezvous: Path
) -> subprocess.Popen[str]:
    """place: rank, number of ranks, and the first layer. The process dies with this one."""
    command = [sys.executable, "-m", "app.core.child_start", str(os.getpid()), MODULE]
    command += [*map(str, place), str(rendezvous)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(assignment.model_dump_json())
    process.stdin.close()
    threading.Thread(target=end_with, args=(process, place[0]), daemon=True).start()
    return process


def end_with(process: subprocess.Popen[str], rank: int) -> None:
    """End this process if the other one fails by itself."""
    code = process.wait()
    if code > 0:
        sys.stderr.write(f"calibration rank {rank} ended with exit code {code}\n")
        sys.stderr.flush()
        os._exit(1)
