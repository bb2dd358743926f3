"""What a run says while it works, and the seconds that it counts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from app.core.assignment import Noted, Progressed, ProgressMessage, StageStarted
from app.core.job import Stage

Send = Callable[[ProgressMessage], None]


class Account:
    """Stages, notes and progress of one run; each is told to the supervisor as it happens."""

    def __init__(self, send: Send, device: torch.device, num_layers: int) -> None:
        self.send, self.device, self.num_layers = send, device, num_layers
        self.seconds: dict[str, float] = defaultdict(float)
        self.candidate_seconds: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.inside: list[float] = []  # of each stage that runs: seconds of the stages inside it
        self.notes: list[str] = []
        self.started = time.monotonic()
        self.span = (0.0, 1.0)  # of the whole job, that `progress` speaks of

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
        """Count the seconds of a stage without a word; inside of another one they are not that one's."""
        started = time.monotonic()
        self.inside.append(0.0)
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            spent = time.monotonic() - started
            own = spent - self.inside.pop()
            if self.inside:
                self.inside[-1] += spent
            self.seconds[stage] += own
            if candidate is not None:
                self.candidate_seconds[candidate][stage] += own

    def progress(self, part: float, layer: int) -> None:
        """`part` of the present span is done."""
        fraction = self.span[0] + part * (self.span[1] - self.span[0])
        spent = time.monotonic() - self.started
        self.send(
            Progressed(
                fraction=fraction,
                layer=layer,
                layers=self.num_layers,
                eta_s=round(spent / fraction * (1 - fraction), 1),
            )
        )

    def note(self, code: str, message: str) -> None:
        self.notes.append(message)
        self.send(Noted(code=code, message=message))
