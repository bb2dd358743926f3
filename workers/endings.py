"""How an attempt ends: with artifacts, with a fault, stopped, or with the job given back."""

from __future__ import annotations

import logging

from app.core.deployments.job_deployment import deploy_result
from app.core.errors import DeadlineExceeded, NibbleError, Unavailable
from app.core.job import Job, JobState, transition
from app.core.job_changes import failed, requeued, stale
from app.core.storage.keys import checkpoint_prefix
from app.core.storage.published import read_manifest, withdraw
from app.core.storage.reuse import Made
from workers.attempt_record import AttemptRecord
from workers.context import WorkerContext
from workers.faults import pause_before_next
from workers.watch import Stopped, StopReason

log = logging.getLogger(__name__)


class Ending:
    """Writes the end of one attempt into the record, and does what follows from it."""

    def __init__(self, context: WorkerContext, record: AttemptRecord) -> None:
        self._context, self._record, self._job = context, record, record.job

    def succeed(self, made: Made, known: str | None) -> None:
        """`known`: the fingerprint of the contents, if they were read.

        Raises Stopped if the job is no longer this attempt's.
        """
        reused_from = made.job if made.job != self._job.id else None
        changes = {"artifacts": made.artifacts, "reused_from": reused_from}
        # The commit point is passed: a request to stop that arrives now comes too late.
        self._deploy(made.artifacts)
        self._record.update(
            lambda job: transition(job, JobState.SUCCEEDED, progress=job.progress.completed(), **changes),
            stoppable=False,
        )
        self._drop_checkpoints()
        self._record.to_the_end(lambda: self._note_made(made, known))

    def _deploy(self, artifacts: tuple[str, ...]) -> None:
        record, deployments, job = self._record, self._context.deployments, self._job
        told = record.to_the_end(lambda: deploy_result(deployments, job, artifacts))
        if told is not None:
            record.to_the_end(lambda: record.store.append_event(job.id, *told))

    def _note_made(self, made: Made, known: str | None) -> None:
        """For later jobs of the same contents, and for the tenant's quota."""
        tenant, context = self._job.tenant, self._context
        for contents in filter(None, (self._job.fingerprint, known)):
            context.reuse.note(tenant, contents, made)
        try:
            manifests = [read_manifest(context.objects, artifact_id) for artifact_id in made.artifacts]
        except Unavailable as fault:
            log.warning("left to the collection of garbage: %s", fault.message, extra={"job": self._job.id})
            return
        for manifest in filter(None, manifests):
            context.limits.add_artifact(tenant, manifest.id, manifest.size)

    def fail(self, fault: NibbleError) -> None:
        def judged(job: Job) -> Job:
            # Who was halted and has lost the lease meets faults of its own, such as files that are gone.
            if not self._context.store.holds(job.id, self._job.attempt):
                raise stale(job, self._job.attempt)
            return failed(job, fault)

        # Its checkpoints stay: a retry of the job goes on from them.
        if self._record.end(judged) is not None:
            self._withdraw()

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
            if self._record.end(lambda job: transition(job, JobState.CANCELLED)) is not None:
                self._withdraw()
                self._drop_checkpoints()
        elif reason is StopReason.DEADLINE:
            limit = self._job.spec.timeout_s
            self.fail(DeadlineExceeded(f"it ran longer than {limit} s", remedy="raise timeout_s, then retry"))
        elif reason is StopReason.SHUTDOWN:
            self._requeue()
        else:
            log.warning("lease lost; another attempt may run", extra={"job": self._job.id})

    def _requeue(self, *, pause_s: float = 0.0) -> None:
        """Give the job back: another attempt goes on from its checkpoints, at once or after a pause."""

        def given_back(job: Job) -> Job:
            if job.state is JobState.CANCELLING:
                return transition(job, JobState.CANCELLED)
            return requeued(job)

        if pause_s > 0:
            self._record.to_the_end(lambda: self._context.store.postpone(self._job.id, pause_s))
        job = self._record.end(given_back)
        self._context.store.release(self._job.id, self._job.attempt)
        # After a pause a janitor queues it.
        if job is not None and job.state is JobState.QUEUED and pause_s == 0:
            self._context.queue.enqueue(job)

    def _withdraw(self) -> None:
        """A job without a result shows no artifact, also if it failed between two formats."""
        try:
            withdraw(self._context.objects, self._job)
        except Unavailable as fault:
            log.warning("left to the collection of garbage: %s", fault.message, extra={"job": self._job.id})

    def _drop_checkpoints(self) -> None:
        try:
            self._context.objects.delete_prefix(checkpoint_prefix(self._job.id))
        except Unavailable as fault:
            # The job has ended well; what is left costs space only.
            log.warning("checkpoints not removed: %s", fault.message, extra={"job": self._job.id})
