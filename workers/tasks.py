"""The one task that the queue may name."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

from workers.attempts.attempt import run_attempt
from workers.attempts.context import WorkerContext

# The queue calls `run_job` by name with what travelled as JSON; all else comes from the worker's main, which
# sets a function, not a context: connections must be made in the process that uses them, after the fork.
open_context: ContextVar[Callable[[], WorkerContext]] = ContextVar("open_context")


def run_job(job_id: str, attempt: int) -> None:
    """Execute an attempt of a job."""
    run_attempt(open_context.get()(), job_id, attempt)
