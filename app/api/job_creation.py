"""From a job body to a recorded, queued job."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NamedTuple

from pydantic import SecretStr

from app.api.deployments import require_engine
from app.api.push_requests import check_push
from app.api.services import Services
from app.core.access.api_keys import Principal
from app.core.errors import NotFound, QuotaExceeded
from app.core.jobs.submission import check_submission, require_memory
from app.core.jobs.turns import QUEUED_AT_ONCE
from app.core.records.ids import new_id
from app.core.records.job import Job, JobState, Progress, ResultFigures
from app.core.records.specs import JobSpec
from app.core.storage.published import figures_of
from app.core.storage.reuse import JobResult
from app.core.telemetry.logs import bound_id


class Creation(NamedTuple):
    job: Job
    is_new: bool


class Order(NamedTuple):
    """A job as its caller asks for it."""

    spec: JobSpec
    hub_token: SecretStr | None
    idempotency_key: str | None
    retry_of: str | None = None

    @property
    def request(self) -> str:
        """What an idempotency key stands for."""
        if self.retry_of is None:
            return self.spec.model_dump_json()
        return f"retry {self.retry_of} {self.spec.timeout_s} {self.spec.force}"


def create_job(services: Services, principal: Principal, order: Order) -> Creation:
    """Check, record and queue a job; returns the original job when the idempotency key was already used."""
    spec, tenant, request = order.spec, principal.tenant, order.request
    earlier = earlier_job(services, tenant, order.idempotency_key, request)
    if earlier is not None:
        return Creation(earlier, is_new=False)
    require_room(services, tenant)
    check_deploy(services, tenant, spec)
    if spec.push is not None:
        check_push(services, principal, spec.push, order.hub_token)
    settings = services.settings.acting_with(order.hub_token).acting_for(tenant)
    checked = check_submission(spec, settings)
    require_memory(checked, services.workers)
    job = Job(
        # Claimed after the checks, so that a refused body does not use up its key.
        id=services.idempotency.claim(tenant, order.idempotency_key, request, new_id("job")),
        tenant=tenant,
        spec=checked.spec,
        choices=checked.plan.choices,
        created_at=datetime.now(UTC),
        fingerprint=checked.fingerprint,
        request_id=bound_id("request"),
        traceparent=bound_id("trace"),
        retry_of=order.retry_of,
        has_hub_token=order.hub_token is not None,
    )
    result = None if spec.force else services.reuse.find(tenant, checked.fingerprint)
    if order.hub_token is None:
        return record_job(services, job, result)
    # Before the job can be queued: a worker that takes it finds its token.
    services.hub_tokens.keep(job.id, order.hub_token)
    try:
        creation = record_job(services, job, result)
    except QuotaExceeded:
        services.hub_tokens.forget(job.id)
        raise
    if not creation.is_new and services.jobs.load(job.id).is_terminal:
        services.hub_tokens.forget(job.id)  # a repeated request whose first one has done its work
    return creation


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


def with_result(job: Job, result: JobResult, figures: ResultFigures | None) -> Job:
    return job.model_copy(
        update={
            "state": JobState.SUCCEEDED,
            "artifacts": result.artifacts,
            "figures": figures,
            "reused_from": result.job,
            "progress": Progress(fraction=1.0),
            "finished_at": datetime.now(UTC),
        }
    )


def check_deploy(services: Services, tenant: str, spec: JobSpec) -> None:
    """Refuse a job whose deployment would be refused later."""
    if spec.deploy is not None:
        services.deployments.require_free(tenant, spec.deploy.names)
        require_engine(services, spec.deploy)


def record_job(services: Services, job: Job, result: JobResult | None) -> Creation:
    """Record the job, then queue it; if this process dies in between, the janitor queues it.

    A job that reuses an earlier result is recorded as succeeded and never queued.
    """
    if result is not None:
        services.reuse.copy_report(result, job.id)
        job = with_result(job, result, figures_of(services.objects, result.artifacts))
    limits = services.limits.of(job.tenant)
    most = {"most_active": limits.active_jobs, "most_turns": limits.running_jobs}
    if services.jobs.create(job, **most, least_queued=QUEUED_AT_ONCE):
        if result is None:
            queue_job(services, job, limits.running_jobs)
        else:
            services.outcome.follow_up(job.id)
        return Creation(job, is_new=True)
    return Creation(services.jobs.get(job.tenant, job.id), is_new=False)


def queue_job(services: Services, job: Job, most_turns: int) -> None:
    """Queue the job, unless its tenant has as many queued, or queued and running, as it may."""
    if not services.jobs.is_in_line(job):
        services.queue.enqueue(job)
        return
    if most_turns and services.jobs.turns_taken(job.tenant) >= most_turns:
        message = f"it waits for a turn: the tenant runs at most {most_turns} jobs at a time"
        services.jobs.append_event(job.id, "note", {"code": "waits_for_turn", "message": message})
    services.turns.give(job.tenant)  # another job may have been taken or have ended in the meantime
