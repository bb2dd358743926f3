"""The clock of a run: the seconds of its stages, and what it reports while they pass."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from app.core.child.assignment import Noted, Progressed, ProgressMessage, StageStarted
from app.core.records.job import Stage

Send = Callable[[ProgressMessage], None]


class Spent(NamedTuple):
    """Seconds on the clock, and on processors."""

    wall: float
    cpu: float


class StageClock:
    """Counts the seconds of a run's stages, and sends stages, notes and progress to the supervisor."""

    def __init__(self, send: Send, device: torch.device, steps: int) -> None:
        self.send, self.device, self.steps = send, device, steps
        self.seconds: dict[str, float] = defaultdict(float)
        self.candidate_seconds: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.cpu_seconds: dict[str, float] = defaultdict(float)  # of all threads: a busy host adds little
        self.inside: list[Spent] = []  # of each stage that runs: what the stages inside it took
        self.notes: list[str] = []
        self.started = time.monotonic()
        self.span = (0.0, 1.0)  # what of the whole job `progress` measures

    def begin(self, *, open_ended: bool) -> None:
        """Leave room for further candidates if their number is unknown."""
        self.span = (0.0, 0.5) if open_ended else (0.0, 1.0)

    def next_span(self) -> None:
        """A further candidate: half of what is left."""
        self.span = (self.span[1], (self.span[1] + 1) / 2)

    @contextmanager
    def stage(self, stage: Stage, candidate: int | None = None) -> Iterator[None]:
        """Announce a stage and count its seconds, of the job and of the candidate it serves."""
        self.send(StageStarted(stage=stage))
        with self.counted(stage, candidate):
            yield

    @contextmanager
    def counted(self, stage: Stage, candidate: int | None = None) -> Iterator[None]:
        """Count a stage's seconds silently; nested seconds are not charged to the outer stage."""
        started = Spent(time.monotonic(), time.process_time())
        self.inside.append(Spent(0.0, 0.0))
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            spent = Spent(time.monotonic() - started.wall, time.process_time() - started.cpu)
            inner = self.inside.pop()
            if self.inside:
                outer = self.inside[-1]
                self.inside[-1] = Spent(outer.wall + spent.wall, outer.cpu + spent.cpu)
            self.seconds[stage] += spent.wall - inner.wall
            self.cpu_seconds[stage] += spent.cpu - inner.cpu
            if candidate is not None:
                self.candidate_seconds[candidate][stage] += spent.wall - inner.wall

    def progress(self, share: float, layer: int) -> None:
        """Report that this share of the present span is done."""
        fraction = self.span[0] + share * (self.span[1] - self.span[0])
        spent = time.monotonic() - self.started
        self.send(
            Progressed(
                fraction=fraction,
                layer=layer,
                layers=self.steps,
                eta_s=round(spent / fraction * (1 - fraction), 1),
            )
        )

    def note(self, code: str, message: str) -> None:
        self.notes.append(message)
        self.send(Noted(code=code, message=message))
