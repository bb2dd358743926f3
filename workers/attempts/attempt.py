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
from contextlib import ExitStack

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
from app.core.child.task_process import fetch_task_data
from app.core.errors import (
    Conflict,
    JobFault,
    NibbleError,
    NotFound,
    RecordUnreadable,
    Unavailable,
)
from app.core.planning.device_profile import NOMINAL, rates_notes
from app.core.records.job import Job, Progress, Stage
from app.core.settings import Settings
from app.core.sources.fetching import FetchedModel, FetchedTexts, ModelCache, fetch_texts
from app.core.storage.published import published_before
from app.core.storage.reuse import Contents, JobResult, fingerprint
from app.core.storage.storage_keys import report_key
from app.core.telemetry.logs import log_ids
from workers.attempts.attempt_record import AttemptRecord
from workers.attempts.checkpoints import CheckpointMirror
from workers.attempts.context import WorkerContext
from workers.attempts.ending import Ending
from workers.attempts.faults import disk_fault, reported
from workers.attempts.publication import Publication, inside
from workers.attempts.resource_use import ResourceSampler
from workers.attempts.stages import Stages
from workers.attempts.watch import Stopped, Watch

log = logging.getLogger(__name__)

PROGRESS_S = 0.5  # the record is rewritten at most this often for progress alone
USE_S = 30.0  # and this often where nothing but the use of memory and processors is new
TAIL_CHARACTERS = 4000  # of the child's output in the failure event


def run_attempt(context: WorkerContext, job_id: str, attempt: int) -> None:
    """Execute an attempt of a job, unless the record is no longer queued for it."""
    lease_s = context.settings.lease_s
    try:
        job = context.store.claim(job_id, attempt, worker=context.name, lease_s=lease_s)
    except (Conflict, NotFound, RecordUnreadable) as refusal:
        log.info("delivery ignored: %s", refusal.message, extra={"job": job_id, "attempt": attempt})
        return
    with log_ids(request=job.request_id, job=job_id, attempt=attempt):
        log.info("attempt begins")
        give_turn(context, job.tenant)
        try:
            with Watch(context.store, job, lease_s=lease_s, shutdown=context.shutdown) as watch:
                Attempt(context, job, watch).run()
        finally:
            context.store.release(job_id, attempt)
            log.info("attempt is over")


def give_turn(context: WorkerContext, tenant: str) -> None:
    """Queue the tenant's next job in place of the one that was claimed; without Redis a sweep does it."""
    try:
        context.turns.give(tenant)
    except RedisError as fault:
        log.warning("the tenant's next job is left to a sweep: %s", fault)


class Attempt:
    """A claimed attempt and its work folder."""

    def __init__(self, context: WorkerContext, job: Job, watch: Watch) -> None:
        self._context = context
        self._job = job
        self._watch = watch
        self._work_folder = context.settings.scratch_dir / f"{job.id}-{job.attempt}"
        self._record = AttemptRecord(context.store, job, watch)
        self._ending = Ending(context, self._record)
        self._stages = Stages(context.tally, context.tracer, job, self._record.to_the_end)
        self._progress = Progress()
        self._written = 0.0
        self._sampler: ResourceSampler | None = None  # while the child runs

    def run(self) -> None:
        """Do the work and write how it ended."""
        with ExitStack() as self._stack:
            error = self._run()
        self._stages.close(error)

    def _run(self) -> str | None:
        """The code of what ended it early; None after success, and where it was stopped on request."""
        try:
            self._make_work_folder()
            result = self._execute()
            self._ending.succeed(result)
            self._stages.leave()
        except Stopped as stop:
            self._ending.stop(stop.reason)
        except (NibbleError, OSError) as error:
            fault = error if isinstance(error, NibbleError) else disk_fault(error)
            self._ending.retry_or_fail(fault)
            return fault.code
        except Exception:  # the task boundary: whatever it was, the job must end
            log.exception("attempt broke", extra={"job": self._job.id})
            own_fault = JobFault("the worker met an error of its own", remedy="read the worker's log")
            self._ending.fail(own_fault)
            return own_fault.code
        finally:
            shutil.rmtree(self._work_folder, ignore_errors=True)
        return None

    def _make_work_folder(self) -> None:
        # An older attempt on this host is dead or about to notice. A newer one runs if this one was halted.
        for older in range(1, self._job.attempt):
            shutil.rmtree(self._work_folder.with_name(f"{self._job.id}-{older}"), ignore_errors=True)
        self._work_folder.mkdir(parents=True, mode=0o700)

    def _execute(self) -> JobResult:
        before = published_before(self._context.objects, self._job)
        if before is not None:
            self._record.event(
                "note", {"code": "already_published", "message": "an earlier attempt had published"}
            )
            return JobResult(job=self._job.id, artifacts=before)
        self._set_stage(Stage.FETCHING)
        settings = self._context.settings.acting_for(self._job.tenant)
        if self._job.has_hub_token:
            token = self._record.through_outages(lambda: self._context.hub_tokens.of(self._job.id))
            settings = settings.acting_with(token)
        model = self._fetch_model(settings)
        texts = fetch_texts(self._job.spec, settings, self._work_folder, self._watch.on_bytes)
        result = self._earlier_result(model, texts)
        if result is not None:
            return result
        fetch_task_data(self._job.spec.tasks, self._work_folder, self._watch.on_bytes)
        assignment, mirror = self._prepare(model, texts)
        finished = self._run_child(assignment, mirror)
        self._set_stage(Stage.PUBLISHING)
        publication = Publication(
            self._context.objects, self._job, model=model, work_folder=self._work_folder
        )
        artifacts = publication.publish(
            finished, check=self._watch.check, before_commit=self._record.check_lease
        )
        return JobResult(job=self._job.id, artifacts=artifacts)

    def _earlier_result(self, model: FetchedModel, texts: FetchedTexts) -> JobResult | None:
        """The result of an earlier job on the same contents, unless `force` asks to compute it again."""
        contents = Contents(
            model=model.merged_digest,
            calibration=texts.calibration_digest,
            evaluation=texts.evaluation_digest,
        )
        digest = fingerprint(self._job.spec, contents)
        # Recorded, as whoever follows up the job's end needs it: another process, if this one dies.
        self._record.update(lambda job: job.model_copy(update={"contents": digest}))
        if self._job.spec.force:
            return None
        result = self._record.through_outages(lambda: self._context.reuse.find(self._job.tenant, digest))
        if result is not None:
            self._record.check_lease()
            self._context.reuse.copy_report(result, self._job.id)
            self._record.event("note", {"code": "reused", "message": f"{result.job} has made this before"})
        return result

    def _fetch_model(self, settings: Settings) -> FetchedModel:
        cache = self._stack.enter_context(ModelCache(settings.model_cache_dir, settings))
        return cache.fetch(self._job.spec.model, self._watch.on_bytes, self._job.spec.adapter)

    def _prepare(self, model: FetchedModel, texts: FetchedTexts) -> tuple[Assignment, CheckpointMirror]:
        """The checkpoints of earlier attempts in place, and the child's assignment."""
        settings, device = self._context.settings, self._context.device
        assignment = Assignment(
            spec=self._job.spec,
            **model.assigned(),
            choices=self._job.choices,
            calibration_digest=texts.calibration_digest,
            calibration_file=texts.calibration,
            evaluation_file=texts.evaluation,
            work_folder=self._work_folder,
            device=device,
            calibration_devices=settings.calibration_devices,
            kernel_backend=settings.kernel_backend,
            shard_bytes=settings.shard_bytes,
            profile=self._context.profile,
        )
        for note in rates_notes(assignment.profile or NOMINAL["cuda" if "cuda" in device else "cpu"]):
            message = f"the report's prediction: {note}"
            self._record.event("note", {"code": "rates_assumed", "message": message})
        identity = assignment.layers_identity(self._job.spec.recipes)
        mirror = CheckpointMirror(self._context.objects, self._job, identity, self._work_folder)
        restored = mirror.restore(self._watch.check)
        for damaged in mirror.damaged:
            note = f"the stored {damaged} differs from its SHA-256 and is computed again"
            self._record.event("note", {"code": "checkpoint_damaged", "message": note})
        if restored:
            self._record.event("resumed", {"attempt": self._job.attempt, "checkpoints": restored})
        return assignment, mirror

    def _run_child(self, assignment: Assignment, mirror: CheckpointMirror) -> Finished:
        """The child's last message.

        Raises Stopped, or the fault that the child reports or that its exit shows.
        """
        grace_s = self._context.settings.cancel_grace_s
        self._stages.leave()  # the start of a process that imports torch is no part of fetching
        with (
            JobChild(assignment, module=self._context.child_module) as child,
            ResourceSampler(child.pid, assignment.device) as self._sampler,
        ):
            self._watch.call_on_stop(lambda: child.stop(grace_s))
            try:
                for message in child.messages(self._renew_use):
                    if isinstance(message, Finished):
                        return message
                    if isinstance(message, Failed):
                        self._store_report(message)
                        raise reported(message.error)
                    self._take_in(message, mirror)
                self._watch.check()
                raise child.wait_fault(grace_s)
            except JobFault as fault:
                self._watch.check()
                output = child.output_tail()[-TAIL_CHARACTERS:]
                peak = self._sampler.peak_bytes
                self._record.event("failure", {"code": fault.code, "output": output, "peak_rss_bytes": peak})
                raise

    def _take_in(self, message: ProgressMessage, mirror: CheckpointMirror) -> None:
        if isinstance(message, StageStarted):
            self._set_stage(message.stage)
        elif isinstance(message, Progressed):
            self._set_progress(message)
        elif isinstance(message, Noted):
            self._record.event("note", message.model_dump(exclude={"kind"}))
        elif isinstance(message, Checkpointed):
            self._store_checkpoint(message, mirror)

    def _store_checkpoint(self, message: Checkpointed, mirror: CheckpointMirror) -> None:
        try:
            mirror.put(message)
        except Unavailable as fault:
            # Hours of work must not end for a checkpoint: it is put again with the next one.
            note = f"{message.key} waits: {fault.message}"
            self._record.event("note", {"code": "checkpoint_not_stored", "message": note})
        else:
            solved = {} if message.layer is None else message.layer.model_dump(exclude_none=True)
            self._record.event("checkpoint", {"key": message.key, "attempt": self._job.attempt, **solved})

    def _store_report(self, message: Failed) -> None:
        """Store the report on the tried candidates: it is useful although nothing is published."""
        if message.report is not None:
            self._record.check_lease()
            report = inside(self._work_folder, message.report)
            self._context.objects.put(report_key(self._job.id), report)

    def _set_stage(self, stage: Stage) -> None:
        self._stages.enter(stage)
        self._record.update(lambda job: job.model_copy(update={"stage": stage}))

    def _set_progress(self, message: Progressed) -> None:
        fraction = min(1.0, max(self._progress.fraction, message.fraction))
        self._progress = Progress(**message.model_dump(exclude={"kind", "fraction"}), fraction=fraction)
        self._write_progress(PROGRESS_S)

    def _renew_use(self) -> None:
        """Between two steps of a large layer nothing else would be new for minutes."""
        if self._sampler is not None and self._sampler.use is not None:
            self._write_progress(USE_S)

    def _write_progress(self, pause_s: float) -> None:
        if time.monotonic() - self._written < pause_s:
            return
        self._written = time.monotonic()
        use = None if self._sampler is None else self._sampler.use
        progress = self._progress.model_copy(update={"use": use})
        self._record.update(lambda job: job.model_copy(update={"progress": progress}))
