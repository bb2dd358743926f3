"""From a job body to a recorded, queued job."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NamedTuple

from app.api.deployments import require_engine
from app.api.services import Services
from app.core.errors import NotFound
from app.core.jobs.submission import check_submission, require_memory
from app.core.records.ids import new_id
from app.core.records.job import Job, JobState, Progress
from app.core.records.specs import JobSpec
from app.core.storage.reuse import JobResult
from app.core.telemetry.logs import bound_id


class Creation(NamedTuple):
    job: Job
    is_new: bool


def create_job(
    services: Services,
    tenant: str,
    spec: JobSpec,
    *,
    idempotency_key: str | None,
    retry_of: str | None = None,
) -> Creation:
    """Check, record and queue a job; returns the original job when the idempotency key was already used."""
    request = spec.model_dump_json() if retry_of is None else f"retry {retry_of}"
    earlier = earlier_job(services, tenant, idempotency_key, request)
    if earlier is not None:
        return Creation(earlier, is_new=False)
    require_room(services, tenant)
    check_deploy(services, tenant, spec)
    checked = check_submission(spec, services.settings)
    require_memory(checked, services.workers)
    job = Job(
        # Claimed after the checks, so that a refused body does not use up its key.
        id=services.idempotency.claim(tenant, idempotency_key, request, new_id("job")),
        tenant=tenant,
        spec=checked.spec,
        choices=checked.plan.choices,
        created_at=datetime.now(UTC),
        fingerprint=checked.fingerprint,
        request_id=bound_id("request"),
        traceparent=bound_id("trace"),
        retry_of=retry_of,
    )
    result = None if spec.force else services.reuse.find(tenant, checked.fingerprint)
    return record_job(services, job, result)


def earlier_job(services: Services, tenant: str, idempotency_key: str | None, request: str) -> Job | None:
    """The job that was already created with the key."""
    job_id = services.idempotency.find(tenant, idempotency_key, request)
    if job_id is None:
        return None
    try:
        return services.jobs.get(tenant, job_id)
    except NotFound:  # the first request has not recorded its job yet, or failed before it did
        return None


def require_room(services: Services, tenant: str) -> None:
    """Raises QueueFull or QuotaExceeded. The limit of active jobs is enforced when the job is recorded."""
    services.queue.require_room(services.jobs.counts()[JobState.QUEUED])
    services.limits.require_storage(tenant)


def with_result(job: Job, result: JobResult) -> Job:
    return job.model_copy(
        update={
            "state": JobState.SUCCEEDED,
            "artifacts": result.artifacts,
            "reused_from": result.job,
            "progress": Progress(fraction=1.0),
            "finished_at": datetime.now(UTC),
        }
    )


def check_deploy(services: Services, tenant: str, spec: JobSpec) -> None:
    """Refuse a job whose deployment would be refused later."""
    if spec.deploy is not None:
        services.deployments.require_free(tenant, spec.deploy.name)
        require_engine(services, spec.deploy)


def record_job(services: Services, job: Job, result: JobResult | None) -> Creation:
    """Record the job, then queue it; if this process dies in between, the janitor queues it.

    A job that reuses an earlier result is recorded as succeeded and never queued.
    """
    if result is not None:
        services.reuse.copy_report(result, job.id)
        job = with_result(job, result)
    limits = services.limits.of(job.tenant)
    if services.jobs.create(job, most_active=limits.active_jobs, most_turns=limits.running_jobs):
        if result is None:
            queue_job(services, job, limits.running_jobs)
        else:
            services.outcome.follow_up(job.id)
        return Creation(job, is_new=True)
    return Creation(services.jobs.get(job.tenant, job.id), is_new=False)


def queue_job(services: Services, job: Job, most_turns: int) -> None:
    """Queue the job, unless its tenant already runs as many as it may."""
    if not most_turns or not services.jobs.is_in_line(job):
        services.queue.enqueue(job)
        return
    message = f"it waits for a turn: the tenant runs at most {most_turns} jobs at a time"
    services.jobs.append_event(job.id, "note", {"code": "waits_for_turn", "message": message})
    services.turns.give(job.tenant)  # another job may have ended in the meantime
