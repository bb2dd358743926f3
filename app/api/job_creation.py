"""From a job body to a recorded, queued job."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NamedTuple

from app.api.dependencies import Services
from app.api.deployments import require_engine
from app.core.errors import NotFound
from app.core.jobs.submission import CheckedSubmission, check_submission
from app.core.records.ids import new_id
from app.core.records.job import Job, JobState, Progress
from app.core.records.specs import JobSpec
from app.core.storage.reuse import Made
from app.core.telemetry.logs import bound_id


class Creation(NamedTuple):
    job: Job
    is_new: bool


def create_job(services: Services, tenant: str, spec: JobSpec, *, idempotency_key: str | None) -> Creation:
    """Check, record and queue a job; with a key that was used before, the job of then."""
    request = spec.model_dump_json()
    if idempotency_key is not None:
        earlier = earlier_job(services, tenant, request, idempotency_key)
        if earlier is not None:
            return Creation(earlier, is_new=False)
    require_room(services, tenant)
    check_deploy(services, tenant, spec)
    checked = check_submission(spec, services.settings)
    # Claimed only now: a refused body must not use up its key.
    job_id = claimed_id(services, tenant, request, idempotency_key)
    return record_job(services, checked, new_job(checked, job_id, tenant))


def claimed_id(services: Services, tenant: str, request: str, key: str | None) -> str:
    fresh = new_id("job")
    return services.idempotency.claim(tenant, key, request, fresh) if key is not None else fresh


def new_job(checked: CheckedSubmission, job_id: str, tenant: str) -> Job:
    return Job(
        id=job_id,
        tenant=tenant,
        spec=checked.spec,
        created_at=datetime.now(UTC),
        fingerprint=checked.fingerprint,
        request_id=bound_id("request"),
        traceparent=bound_id("trace"),
    )


def require_room(services: Services, tenant: str) -> None:
    """Raises QueueFull or QuotaExceeded. The limit of active jobs is kept when the job is recorded."""
    services.queue.require_room(services.jobs.counts()[JobState.QUEUED])
    services.limits.require_storage(tenant)


def retry_job(services: Services, job: Job, *, idempotency_key: str | None) -> Creation:
    """A new job with the spec of one that has ended; with a key that was used before, the job of then."""
    request = f"retry {job.id}"
    if idempotency_key is not None:
        earlier = earlier_job(services, job.tenant, request, idempotency_key)
        if earlier is not None:
            return Creation(earlier, is_new=False)
    require_room(services, job.tenant)
    check_deploy(services, job.tenant, job.spec)
    checked = check_submission(job.spec, services.settings)
    job_id = claimed_id(services, job.tenant, request, idempotency_key)
    again = new_job(checked, job_id, job.tenant).model_copy(update={"retry_of": job.id})
    return record_job(services, checked, again)


def reusing(job: Job, made: Made) -> Job:
    return job.model_copy(
        update={
            "state": JobState.SUCCEEDED,
            "artifacts": made.artifacts,
            "reused_from": made.job,
            "progress": Progress(fraction=1.0),
            "finished_at": datetime.now(UTC),
        }
    )


def check_deploy(services: Services, tenant: str, spec: JobSpec) -> None:
    """Refuse now what the deployment after the job would be refused for."""
    if spec.deploy is not None:
        services.deployments.require_free(tenant, spec.deploy.name)
        require_engine(services, spec.deploy)


def earlier_job(services: Services, tenant: str, request: str, key: str) -> Job | None:
    job_id = services.idempotency.find(tenant, key, request)
    if job_id is None:
        return None
    try:
        return services.jobs.get(tenant, job_id)
    except NotFound:  # the first request has not come that far yet, or never did
        return None


def record_job(services: Services, checked: CheckedSubmission, job: Job) -> Creation:
    """Record, then queue: if this process dies in between, a janitor queues the job.

    What was made before is not made again: the job has succeeded as it is recorded.
    """
    made = None if job.spec.force else services.reuse.find(job.tenant, checked.fingerprint)
    if made is not None:
        services.reuse.copy_report(made, job.id)
        job = reusing(job, made)
    limits = services.limits.of(job.tenant)
    if services.jobs.create(job, most_active=limits.active_jobs, most_turns=limits.running_jobs):
        if made is None:
            queue_job(services, job, limits.running_jobs)
        else:
            services.outcome.follow_up(job.id)
        return Creation(job, is_new=True)
    return Creation(services.jobs.get(job.tenant, job.id), is_new=False)


def queue_job(services: Services, job: Job, most_turns: int) -> None:
    """Queue the job, unless it has to wait for its tenant's other jobs."""
    if not most_turns or not services.jobs.is_in_line(job):
        services.queue.enqueue(job)
        return
    told = f"it waits for a turn: the tenant runs at most {most_turns} jobs at a time"
    services.jobs.append_event(job.id, "note", {"code": "waits_for_turn", "message": told})
    services.turns.give(job.tenant)  # one may have become free just now
