"""The stages of one attempt: their seconds are counted, and each is a span of the attempt's trace."""

from __future__ import annotations

import time
from collections.abc import Callable

from app.core.records.job import Job, Stage
from app.core.telemetry.tally import Tally
from app.core.telemetry.tracing import Span, SpanKind, Tracer, parse_traceparent


class Stages:
    """`write` runs a write to Redis as the attempt does."""

    def __init__(
        self, tally: Tally, tracer: Tracer, job: Job, write: Callable[[Callable[[], None]], None]
    ) -> None:
        self._tally = tally
        self._tracer = tracer
        self._job = job
        self._write = write
        self._attempt = tracer.span("attempt", parse_traceparent(job.traceparent), SpanKind.CONSUMER)
        self._current: tuple[Stage, float, Span] | None = None

    def enter(self, stage: Stage) -> None:
        """The stage that begins, unless it is the one that runs."""
        if self._current is None or self._current[0] is not stage:
            self.leave()
            self._current = (stage, time.monotonic(), self._tracer.span(stage, self._attempt.context))

    def leave(self) -> None:
        """The end of the stage that runs, in good order."""
        if self._current is not None:
            stage, began, span = self._current
            self._current = None
            span.end({"nibble.job": self._job.id})
            seconds = time.monotonic() - began
            self._write(lambda: self._tally.add_stage(stage, seconds))

    def close(self, error: str | None) -> None:
        """The end of the attempt, with the code of its error. A stage that broke is traced, not counted."""
        if self._current is not None:
            self._current[2].end({"nibble.job": self._job.id}, error=error)
        self._attempt.end({"nibble.job": self._job.id, "nibble.attempt": self._job.attempt}, error=error)
        self._tracer.close()
