"""One attempt of a job, from claim to end, without touching a tensor.

claim      QUEUED -> RUNNING under a lease; a duplicate or stale delivery is left alone
fetch      model and texts to this host, checkpoints of earlier attempts
run        the child computes; its progress becomes record, events and stored checkpoints
publish    files, report, manifests
end        succeeded, failed, cancelled, or back to the queue when this worker stops
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

from redis.exceptions import RedisError

from app.core.child.assignment import (
    Assignment,
    Checkpointed,
    Failed,
    Finished,
    Noted,
    Progressed,
    ProgressMessage,
    StageStarted,
)
from app.core.child.job_child import JobChild
from app.core.deployments.job_deployment import deploy_result
from app.core.errors import (
    Conflict,
    DeadlineExceeded,
    JobFault,
    NibbleError,
    NotFound,
    RecordUnreadable,
    Unavailable,
)
from app.core.job import Job, JobState, Progress, Stage, transition
from app.core.job_changes import failed, requeued, stale
from app.core.storage.keys import checkpoint_prefix, report_key
from app.core.storage.published import published_before, read_manifest, withdraw
from app.core.storage.reuse import Contents, Made, fingerprint
from app.core.telemetry.logs import log_ids
from workers.checkpoints import CheckpointMirror, checkpoint_key
from workers.context import WorkerContext
from workers.faults import disk_fault, may_pass, pause_before_next, reported
from workers.fetching import FetchedModel, FetchedTexts, ModelCache, fetch_texts
from workers.publication import Publication, inside
from workers.stages import Stages
from workers.watch import Stopped, StopReason, Watch

log = logging.getLogger(__name__)
T = TypeVar("T")

PROGRESS_S = 0.5  # the record is rewritten at most this often for progress alone
TAIL_CHARACTERS = 4000  # of the child's output in the failure event
REDIS_PATIENCE_S = 60.0


def run_attempt(context: WorkerContext, job_id: str, attempt: int) -> None:
    """Execute an attempt of a job, unless the record says that it is not this one's turn."""
    lease_s = context.settings.lease_s
    try:
        job = context.store.claim(job_id, attempt, worker=context.name, lease_s=lease_s)
    except (Conflict, NotFound, RecordUnreadable) as refusal:
        log.info("delivery ignored: %s", refusal.message, extra={"job": job_id, "attempt": attempt})
        return
    with log_ids(request=job.request_id, job=job_id, attempt=attempt):
        log.info("attempt begins")
        try:
            with Watch(context.store, job, lease_s=lease_s, shutdown=context.shutdown) as watch:
                Attempt(context, job, watch).run()
        finally:
            context.store.release(job_id, attempt)
            context.turns.give_late(job.tenant)
            log.info("attempt is over")


class Attempt:
    """A claimed attempt and its work folder."""

    def __init__(self, context: WorkerContext, job: Job, watch: Watch) -> None:
        self._context = context
        self._job = job
        self._watch = watch
        self._work_folder = context.settings.scratch_dir / f"{job.id}-{job.attempt}"
        self._fingerprint: str | None = None
        late = partial(self._through_outages, stoppable=False)
        self._stages = Stages(context.tally, context.tracer, job, late)
        self._fraction = 0.0
        self._written = 0.0

    def run(self) -> None:
        """Do the work and write how it ended."""
        with ExitStack() as self._stack:
            self._run()
        self._stages.close()

    def _run(self) -> None:
        try:
            self._make_work_folder()
            self._succeed(self._execute())
        except Stopped as stop:
            self._stop(stop.reason)
        except NibbleError as fault:
            self._retry_or_fail(fault)
        except OSError as fault:
            self._retry_or_fail(disk_fault(fault))
        except Exception:  # the task boundary: whatever it was, the job must end
            log.exception("attempt broke", extra={"job": self._job.id})
            self._fail(JobFault("the worker met an error of its own", remedy="read the worker's log"))
        finally:
            shutil.rmtree(self._work_folder, ignore_errors=True)

    def _make_work_folder(self) -> None:
        # An older attempt on this host is dead or about to notice. A newer one runs if this one was halted.
        for older in range(1, self._job.attempt):
            shutil.rmtree(self._work_folder.with_name(f"{self._job.id}-{older}"), ignore_errors=True)
        self._work_folder.mkdir(parents=True, mode=0o700)

    def _execute(self) -> Made:
        before = published_before(self._context.objects, self._job)
        if before is not None:
            self._event("note", {"code": "already_published", "message": "an earlier attempt had published"})
            return Made(job=self._job.id, artifacts=before)
        self._set_stage(Stage.FETCHING)
        model = self._fetch_model()
        texts = fetch_texts(self._job.spec, self._context.settings, self._work_folder, self._watch.on_bytes)
        made = self._made_before(model, texts)
        if made is not None:
            return made
        assignment, mirror = self._prepare(model, texts)
        finished = self._run_child(assignment, mirror)
        self._set_stage(Stage.PUBLISHING)
        publication = Publication(
            self._context.objects, self._job, model_digest=model.digest, work_folder=self._work_folder
        )
        artifacts = publication.publish(finished, check=self._watch.check, before_commit=self._check_lease)
        return Made(job=self._job.id, artifacts=artifacts)

    def _made_before(self, model: FetchedModel, texts: FetchedTexts) -> Made | None:
        """What another job has made of the same contents, unless this one shall compute again."""
        contents = Contents(
            model=model.digest, calibration=texts.calibration_digest, evaluation=texts.evaluation_digest
        )
        known = self._fingerprint = fingerprint(self._job.spec, contents)
        if self._job.spec.force:
            return None
        made = self._through_outages(lambda: self._context.reuse.find(self._job.tenant, known))
        if made is not None:
            self._check_lease()
            self._context.reuse.copy_report(made, self._job.id)
            self._event("note", {"code": "reused", "message": f"{made.job} has made this before"})
        return made

    def _fetch_model(self) -> FetchedModel:
        settings = self._context.settings
        cache = self._stack.enter_context(ModelCache(settings.state_dir / "cache" / "models", settings))
        return cache.fetch(self._job.spec.model, self._watch.on_bytes)

    def _prepare(self, model: FetchedModel, texts: FetchedTexts) -> tuple[Assignment, CheckpointMirror]:
        """The checkpoints of earlier attempts in place, and the child's assignment."""
        settings, device = self._context.settings, self._context.device
        key = checkpoint_key(self._job, model=model.digest, text=texts.calibration_digest, device=device)
        mirror = CheckpointMirror(self._context.objects, self._job, key, self._work_folder)
        restored = mirror.restore(self._watch.check)
        for damaged in mirror.damaged:
            note = f"the stored {damaged} differs from its SHA-256 and is computed again"
            self._event("note", {"code": "checkpoint_damaged", "message": note})
        if restored:
            self._event("resumed", {"attempt": self._job.attempt, "checkpoints": restored})
        assignment = Assignment(
            spec=self._job.spec,
            model_folder=model.folder,
            model_name=model.name,
            model_digest=model.digest,
            calibration_file=texts.calibration,
            evaluation_file=texts.evaluation,
            work_folder=self._work_folder,
            device=device,
            calibration_devices=settings.calibration_devices,
            kernel_backend=settings.kernel_backend,
            shard_bytes=settings.shard_bytes,
            profile=self._context.profile,
        )
        return assignment, mirror

    def _run_child(self, assignment: Assignment, mirror: CheckpointMirror) -> Finished:
        """The child's last message.

        Raises Stopped, or the fault that the child reports or that its exit shows.
        """
        grace_s = self._context.settings.cancel_grace_s
        with JobChild(assignment, module=self._context.child_module) as child:
            self._watch.call_on_stop(lambda: child.terminate(grace_s))
            try:
                for message in child.messages():
                    if isinstance(message, Finished):
                        return message
                    if isinstance(message, Failed):
                        self._store_report(message)
                        raise reported(message.error)
                    self._record(message, mirror)
                self._watch.check()
                raise child.wait_fault(grace_s)
            except JobFault as fault:
                self._watch.check()
                self._event("failure", {"code": fault.code, "output": child.output_tail()[-TAIL_CHARACTERS:]})
                raise

    def _record(self, message: ProgressMessage, mirror: CheckpointMirror) -> None:
        if isinstance(message, StageStarted):
            self._set_stage(message.stage)
        elif isinstance(message, Progressed):
            self._set_progress(message)
        elif isinstance(message, Noted):
            self._event("note", message.model_dump(exclude={"kind"}))
        elif isinstance(message, Checkpointed):
            self._store_checkpoint(message, mirror)

    def _store_checkpoint(self, message: Checkpointed, mirror: CheckpointMirror) -> None:
        try:
            mirror.put(message)
        except Unavailable as fault:
            # Hours of work must not end for a checkpoint: it is put again with the next one.
            note = f"{message.key} waits: {fault.message}"
            self._event("note", {"code": "checkpoint_not_stored", "message": note})
        else:
            self._event("checkpoint", {"key": message.key, "attempt": self._job.attempt})

    def _store_report(self, message: Failed) -> None:
        """What was tried is worth reading although nothing is published."""
        if message.report is not None:
            self._check_lease()
            report = inside(self._work_folder, message.report)
            self._context.objects.put(report_key(self._job.id), report)

    def _set_stage(self, stage: Stage) -> None:
        self._stages.enter(stage)
        self._update(lambda job: job.model_copy(update={"stage": stage}))

    def _set_progress(self, message: Progressed) -> None:
        self._fraction = min(1.0, max(self._fraction, message.fraction))
        if time.monotonic() - self._written < PROGRESS_S:
            return
        self._written = time.monotonic()
        progress = Progress(**message.model_dump(exclude={"kind", "fraction"}), fraction=self._fraction)
        self._update(lambda job: job.model_copy(update={"progress": progress}))

    def _deploy(self, artifacts: tuple[str, ...]) -> None:
        deployments, store, job = self._context.deployments, self._context.store, self._job
        told = self._through_outages(lambda: deploy_result(deployments, job, artifacts), stoppable=False)
        if told is not None:
            self._through_outages(lambda: store.append_event(job.id, *told), stoppable=False)

    def _succeed(self, made: Made) -> None:
        reused_from = made.job if made.job != self._job.id else None
        changes = {"artifacts": made.artifacts, "reused_from": reused_from}
        # The commit point is passed: a request to stop that arrives now comes too late.
        self._deploy(made.artifacts)
        self._update(
            lambda job: transition(job, JobState.SUCCEEDED, progress=job.progress.completed(), **changes),
            stoppable=False,
        )
        self._stages.leave()
        self._drop_checkpoints()
        self._through_outages(lambda: self._note_made(made), stoppable=False)

    def _note_made(self, made: Made) -> None:
        """For later jobs of the same contents, and for the tenant's quota."""
        tenant, context = self._job.tenant, self._context
        for known in filter(None, (self._job.fingerprint, self._fingerprint)):
            context.reuse.note(tenant, known, made)
        try:
            manifests = [read_manifest(context.objects, artifact_id) for artifact_id in made.artifacts]
        except Unavailable as fault:
            log.warning("left to the collection of garbage: %s", fault.message, extra={"job": self._job.id})
            return
        for manifest in filter(None, manifests):
            context.limits.add_artifact(tenant, manifest.id, manifest.size)

    def _fail(self, fault: NibbleError) -> None:
        def judged(job: Job) -> Job:
            # Who was halted and has lost the lease meets faults of its own, such as files that are gone.
            if not self._context.store.holds(job.id, self._job.attempt):
                raise stale(job, self._job.attempt)
            return failed(job, fault)

        # Its checkpoints stay: a retry of the job goes on from them.
        if self._end(judged) is not None:
            self._withdraw()

    def _retry_or_fail(self, fault: NibbleError) -> None:
        """Give the job back after a pause if another attempt may fare better."""
        attempt = self._job.attempt
        pause_s = pause_before_next(fault, attempt, self._context.settings)
        if pause_s is None:
            self._fail(fault)
            return
        payload = {"code": fault.code, "message": fault.message, "attempt": attempt, "pause_s": pause_s}
        try:
            self._event("retry", payload)
        except Stopped as stop:
            self._stop(stop.reason)
            return
        self._requeue(pause_s=pause_s)

    def _stop(self, reason: StopReason) -> None:
        if reason is StopReason.CANCELLED:
            if self._end(lambda job: transition(job, JobState.CANCELLED)) is not None:
                self._withdraw()
                self._drop_checkpoints()
        elif reason is StopReason.DEADLINE:
            limit = self._job.spec.timeout_s
            self._fail(
                DeadlineExceeded(f"it ran longer than {limit} s", remedy="raise timeout_s, then retry")
            )
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
            self._through_outages(
                lambda: self._context.store.postpone(self._job.id, pause_s), stoppable=False
            )
        job = self._end(given_back)
        self._context.store.release(self._job.id, self._job.attempt)
        # After a pause a janitor queues it.
        if job is not None and job.state is JobState.QUEUED and pause_s == 0:
            self._context.queue.enqueue(job)

    def _end(self, change: Callable[[Job], Job]) -> Job | None:
        """Write how the attempt ended; None if it is no longer this attempt's to write."""
        try:
            return self._update(change, stoppable=False)
        except Stopped:
            return None

    def _update(self, change: Callable[[Job], Job], *, stoppable: bool = True) -> Job:
        job_id, attempt = self._job.id, self._job.attempt
        return self._through_outages(
            lambda: self._context.store.update(job_id, change, attempt), stoppable=stoppable
        )

    def _event(self, kind: str, payload: dict[str, Any]) -> None:
        job_id, attempt = self._job.id, self._job.attempt
        self._through_outages(lambda: self._context.store.append_event(job_id, kind, payload, attempt))

    def _through_outages(self, ask: Callable[[], T], *, stoppable: bool = True) -> T:
        """What Redis answers, also after a restart. Raises Stopped if the job is no longer this attempt's."""
        give_up = time.monotonic() + REDIS_PATIENCE_S
        while True:
            if stoppable:
                self._watch.check()
            try:
                return ask()
            except RedisError as fault:
                if not may_pass(fault):
                    raise
                log.warning("redis does not do what it is asked: %s", fault)
                if time.monotonic() > give_up:
                    raise Stopped(StopReason.LEASE_LOST) from fault
            except (Conflict, NotFound, RecordUnreadable) as refusal:
                log.warning("not written: %s", refusal.message, extra={"job": self._job.id})
                raise Stopped(StopReason.LEASE_LOST) from refusal
            time.sleep(0.5)

    def _check_lease(self) -> None:
        """Look at the lease itself: a process that was halted for minutes hasn't heard of its loss yet."""
        store, job = self._context.store, self._job
        if not self._through_outages(lambda: store.holds(job.id, job.attempt)):
            raise Stopped(StopReason.LEASE_LOST)

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
