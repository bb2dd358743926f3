"""How an attempt ends: with artifacts, with a fault, stopped, or with the job given back.

What follows from the end of the job is not this module's: app.core.jobs.outcome.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from app.core.errors import DeadlineExceeded, NibbleError
from app.core.records.job import Job, JobState, transition
from app.core.records.job_changes import failed, requeued, stale
from app.core.storage.published import figures_of
from app.core.storage.reuse import JobResult
from workers.attempts.attempt_record import AttemptRecord
from workers.attempts.context import WorkerContext
from workers.attempts.faults import pause_before_next
from workers.attempts.watch import Stopped, StopReason

log = logging.getLogger(__name__)


class Ending:
    """Writes the end of one attempt into the record."""

    def __init__(self, context: WorkerContext, record: AttemptRecord) -> None:
        self._context, self._record, self._job = context, record, record.job

    def succeed(self, result: JobResult) -> None:
        """Raises Stopped if the job is no longer this attempt's."""
        reused_from = result.job if result.job != self._job.id else None
        figures = figures_of(self._context.objects, result.artifacts)
        changes = {"artifacts": result.artifacts, "figures": figures, "reused_from": reused_from}
        # The commit point is passed: a request to stop that arrives now comes too late.
        self._record.update(
            lambda job: transition(job, JobState.SUCCEEDED, progress=job.progress.completed(), **changes),
            stoppable=False,
        )
        self._context.outcome.follow_up(self._job.id)

    def fail(self, fault: NibbleError) -> None:
        def judged(job: Job) -> Job:
            # Who was halted and has lost the lease meets faults of its own, such as files that are gone.
            if not self._context.store.holds(job.id, self._job.attempt):
                raise stale(job, self._job.attempt)
            return failed(job, fault)

        self._end(judged)

    def retry_or_fail(self, fault: NibbleError) -> None:
        """Give the job back after a pause if another attempt may fare better."""
        attempt = self._job.attempt
        pause_s = pause_before_next(fault, attempt, self._context.settings)
        if pause_s is None:
            self.fail(fault)
            return
        payload = {"code": fault.code, "message": fault.message, "attempt": attempt, "pause_s": pause_s}
        try:
            self._record.event("retry", payload)
        except Stopped as stop:
            self.stop(stop.reason)
            return
        self._requeue(pause_s=pause_s)

    def stop(self, reason: StopReason) -> None:
        if reason is StopReason.CANCELLED:
            self._end(lambda job: transition(job, JobState.CANCELLED))
        elif reason is StopReason.DEADLINE:
            limit = self._job.spec.timeout_s
            remedy = (
                "retry it with a larger timeout_s: it goes on after the last finished layer; or submit it "
                "again (nibble submit --timeout)"
            )
            self.fail(DeadlineExceeded(f"it ran longer than {limit} s", remedy=remedy))
        elif reason is StopReason.SHUTDOWN:
            self._requeue()
        else:
            log.warning("lease lost; another attempt may run", extra={"job": self._job.id})

    def _end(self, change: Callable[[Job], Job]) -> Job | None:
        """Write how the attempt ended, and follow up a job's end; None if it may not write any more."""
        job = self._record.end(change)
        if job is not None:
            self._context.outcome.follow_up(job.id)
        return job

    def _requeue(self, *, pause_s: float = 0.0) -> None:
        """Give the job back: another attempt goes on from its checkpoints, at once or after a pause."""

        def given_back(job: Job) -> Job:
            if job.state is JobState.CANCELLING:
                return transition(job, JobState.CANCELLED)
            return requeued(job)

        if pause_s > 0:
            self._record.to_the_end(lambda: self._context.store.postpone(self._job.id, pause_s))
        job = self._end(given_back)
        self._context.store.release(self._job.id, self._job.attempt)
        # After a pause a janitor queues it.
        if job is not None and job.state is JobState.QUEUED and pause_s == 0:
            self._context.queue.enqueue(job)
