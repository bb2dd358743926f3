"""From a job body to a recorded, queued job."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NamedTuple

from app.api.dependencies import Services
from app.core.errors import NotFound
from app.core.ids import new_id
from app.core.job import Job
from app.core.specs import JobSpec
from app.core.submission import check_submission


class Creation(NamedTuple):
    job: Job
    is_new: bool


def create_job(services: Services, tenant: str, spec: JobSpec, *, idempotency_key: str | None) -> Creation:
    """Check, record and queue a job; with a key that was used before, the job of then."""
    if idempotency_key is not None:
        earlier = earlier_job(services, tenant, spec, idempotency_key)
        if earlier is not None:
            return Creation(earlier, is_new=False)
    services.queue.require_room()
    checked = check_submission(spec, services.settings)
    # Claimed only now: a refused body must not use up its key.
    job_id = (
        services.idempotency.claim(tenant, idempotency_key, spec)
        if idempotency_key is not None
        else new_id("job")
    )
    return record_job(
        services, Job(id=job_id, tenant=tenant, spec=checked.spec, created_at=datetime.now(UTC))
    )


def retry_job(services: Services, job: Job) -> Creation:
    """A new job with the spec of one that has ended."""
    services.queue.require_room()
    checked = check_submission(job.spec, services.settings)
    again = Job(
        id=new_id("job"),
        tenant=job.tenant,
        spec=checked.spec,
        created_at=datetime.now(UTC),
        retry_of=job.id,
    )
    return record_job(services, again)


def earlier_job(services: Services, tenant: str, spec: JobSpec, key: str) -> Job | None:
    job_id = services.idempotency.find(tenant, key, spec)
    if job_id is None:
        return None
    try:
        return services.jobs.get(tenant, job_id)
    except NotFound:  # the first request has not come that far yet, or never did
        return None


def record_job(services: Services, job: Job) -> Creation:
    """Record, then queue: if this process dies in between, a janitor queues the job."""
    is_new = services.jobs.create(job)
    if is_new:
        services.queue.enqueue(job)
        return Creation(job, is_new=True)
    return Creation(services.jobs.get(job.tenant, job.id), is_new=False)
