"""`/v1/jobs`: create, list, read, cancel, retry, delete."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from app.api.dependencies import JobsReader, JobsWriter, ServicesParam
from app.api.job_creation import Creation, Order, create_job
from app.api.paging import PageQuery
from app.api.polled import polled
from app.api.preconditions import (
    UNCHANGED,
    IdempotencyKey,
    IfNoneMatch,
    matches_tag,
    preferred_wait,
    tagged_answer,
)
from app.api.schemas import JobExport, JobList, JobView
from app.api.services import Services
from app.api.waiting import wait_for_job
from app.core.access.api_keys import Principal, Scope
from app.core.changes.redis_keys import job_key, jobs_stamp
from app.core.errors import Conflict, InvalidRequest, MalformedRequest, NotFound
from app.core.jobs.export import flat_job
from app.core.jobs.job_scripts import MAX_EVENTS
from app.core.jobs.job_store import JobFilter
from app.core.jobs.report import Report
from app.core.jobs.unfinished import UnfinishedReport, unfinished_report
from app.core.records.job import Job, JobState
from app.core.records.job_body import JobSubmission, RetryBody
from app.core.records.job_changes import cancel_requested
from app.core.records.specs import JobSpec
from app.core.storage.storage_keys import checkpoint_prefix, report_key

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

STAMPS_LAST_S = 30.0
# Retry-After hints for polling, in seconds.
POLL_AFTER = {JobState.QUEUED: 5, JobState.RUNNING: 2, JobState.CANCELLING: 1}

Prefer = Annotated[str | None, Header(description="`wait=N` waits up to N seconds, at most 60.")]


def etag_of(version: int) -> str:
    return f'"{version}"'


def answer(job: Job, *, status: int = 200, headers: dict[str, str] | None = None) -> JSONResponse:
    """The job with a Retry-After hint for polling."""
    return JSONResponse(
        JobView.of(job).model_dump(mode="json"), status_code=status, headers={**hints(job), **(headers or {})}
    )


def hints(job: Job) -> dict[str, str]:
    return {"Retry-After": str(POLL_AFTER[job.state])} if job.state in POLL_AFTER else {}


@router.post("", status_code=202, response_model=JobView, responses={200: {"model": JobView}})
async def submit_job(
    body: JobSubmission,
    services: ServicesParam,
    principal: JobsWriter,
    idempotency_key: IdempotencyKey = None,
    prefer: Prefer = None,
) -> JSONResponse:
    """Record and queue a job. 202 means that it is recorded."""
    order = Order(body.spec, body.hub_token, idempotency_key)
    require_scopes(principal, order.spec)
    created = await run_in_threadpool(create_job, services, principal, order)
    return await created_answer(services, created, prefer)


def require_scopes(principal: Principal, spec: JobSpec) -> None:
    """Raises Forbidden if what follows from the job is not the caller's to ask for."""
    if spec.deploy is not None:
        principal.require(Scope.DEPLOYMENTS_WRITE)
    if spec.push is not None:
        principal.require(Scope.ARTIFACTS_WRITE)


async def created_answer(services: Services, created: Creation, prefer: str | None) -> JSONResponse:
    job = created.job
    headers = {"Location": f"/v1/jobs/{job.id}"}
    wait_s = preferred_wait(prefer)
    if wait_s is not None:
        headers["Preference-Applied"] = f"wait={wait_s}"
        job, _ = await wait_for_job(
            services, job.tenant, job.id, wait_s=wait_s, until=lambda job, version: job.is_terminal
        )
    return answer(job, status=202 if created.is_new else 200, headers=headers)


class JobQuery(PageQuery):
    """Filters of the list."""

    state: JobState | None = None
    label: list[str] = Field(default=[], description="key=value; repeat it to require several labels.")
    q: str = Field(
        default="",
        max_length=200,
        description="Words that all occur in id, model, recipes and labels.",
    )
    counts: bool = Field(default=False, description="With the number of the tenant's jobs in each state.")
    view: Literal["full", "brief"] = Field(default="full", description="`brief` leaves out the specs.")


@router.get("", response_model=JobList, responses=UNCHANGED)
@polled(STAMPS_LAST_S, lambda tenant: (jobs_stamp(tenant),))
def list_jobs(
    services: ServicesParam,
    principal: JobsReader,
    query: Annotated[JobQuery, Query()],
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The tenant's jobs, newest first."""
    labels = parsed_labels(query.label)
    words = tuple(query.q.lower().split())
    job_filter = JobFilter(
        state=query.state, labels=labels, words=words, limit=query.limit, after=query.after
    )
    counts = services.jobs.counts_of(principal.tenant) if query.counts else None
    jobs = services.jobs.page(principal.tenant, job_filter)
    page = JobList.of(jobs, brief=query.view == "brief", counts=counts)
    return tagged_answer(page, if_none_match)


def parsed_labels(labels: list[str]) -> dict[str, str]:
    pairs = [label.partition("=") for label in labels]
    for key, separator, value in pairs:
        if not key or not separator:
            raise MalformedRequest(
                f"the label filter {(key + separator + value)[:200]!r} is not of the form key=value",
                code="label_filter_invalid",
                remedy="write label=team=search",
                param="label",
            )
    return {key: value for key, _, value in pairs}


@router.get("/{job_id}", response_model=JobView, responses=UNCHANGED)
@polled(STAMPS_LAST_S, lambda tenant, job_id: (job_key(job_id),))
async def read_job(
    job_id: str,
    services: ServicesParam,
    principal: JobsReader,
    if_none_match: IfNoneMatch = None,
    prefer: Prefer = None,
) -> Response:
    """The job. `Prefer: wait=N` delays the answer until the job differs from `If-None-Match`, or from now."""
    tenant = principal.tenant
    job, version = await run_in_threadpool(services.jobs.read_for, tenant, job_id)
    tag = if_none_match or etag_of(version)
    wait_s = preferred_wait(prefer)
    headers = {"Cache-Control": "private, no-cache"}
    if wait_s is not None:
        headers["Preference-Applied"] = f"wait={wait_s}"
        if matches_tag(tag, etag_of(version)) and not job.is_terminal:
            job, version = await wait_for_job(
                services,
                tenant,
                job_id,
                wait_s=wait_s,
                until=lambda _, version: not matches_tag(tag, etag_of(version)),
            )
    headers["ETag"] = etag_of(version)
    if matches_tag(if_none_match, etag_of(version)):
        return Response(status_code=304, headers={**hints(job), **headers})
    return answer(job, headers=headers)


@router.get("/{job_id}/report", response_model=Report | UnfinishedReport)
def read_report(job_id: str, services: ServicesParam, principal: JobsReader) -> Response:
    """The quality report of a job.

    A job that failed or was cancelled before it had one gets a report on what it did until then, with
    `complete: false`: layers, seconds per stage, notes, prediction.
    """
    job = services.jobs.get(principal.tenant, job_id)
    try:
        report = services.objects.get(report_key(job.id))
    except NotFound as fault:
        if job.has_no_result:
            events = services.jobs.events(job.id, limit=2 * MAX_EVENTS)
            return JSONResponse(unfinished_report(job, events).model_dump(mode="json"))
        remedy = "wait until the job has ended"
        if job.is_terminal:
            remedy = "it went with the job that made the artifacts; submit this one again with force"
        raise NotFound(
            f"job {job.id} is {job.state} and has no report", code="report_not_found", remedy=remedy
        ) from fault
    return Response(report, media_type="application/json")


@router.get("/{job_id}/export")
def export_job(job_id: str, services: ServicesParam, principal: JobsReader) -> JobExport:
    """The job as flat params, metrics and tags, as MLflow and Weights & Biases take them."""
    job = services.jobs.get(principal.tenant, job_id)
    try:
        report = json.loads(services.objects.get(report_key(job.id)))
    except NotFound:
        report = None
    return JobExport(id=job.id, **flat_job(job, report).model_dump())


@router.post("/{job_id}/cancel", response_model=JobView, responses={202: {"model": JobView}})
def cancel_job(job_id: str, services: ServicesParam, principal: JobsWriter) -> JSONResponse:
    """Stop a job: at once if it is queued (200), else within seconds (202, state `cancelling`)."""
    services.jobs.get(principal.tenant, job_id)
    job = services.jobs.update(job_id, cancel_requested)
    services.outcome.follow_up(job.id)
    return answer(job, status=202 if job.state is JobState.CANCELLING else 200)


@router.post("/{job_id}/retry", status_code=202, response_model=JobView, responses={200: {"model": JobView}})
def retry_job(
    job_id: str,
    services: ServicesParam,
    principal: JobsWriter,
    body: RetryBody | None = None,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """A new job with the same spec; `retry_of` names this one. A hub token is not kept: send it again.

    `timeout_s` and `force` take the place of the spec's.
    """
    job = services.jobs.get(principal.tenant, job_id)
    if not job.is_terminal:
        raise Conflict(
            f"job {job_id} is {job.state}; only a job that has ended can be retried",
            code="job_not_finished",
            remedy="wait until it ends, or cancel it",
        )
    token = None if body is None else body.hub_token
    if job.has_hub_token and token is None:
        raise InvalidRequest(
            f"job {job_id} was submitted with a hub token, which is not kept",
            code="hub_token_missing",
            remedy='send it again: {"hub_token": "…"} as the body, or nibble retry --hub-token FILE',
            param="hub_token",
        )
    spec = job.spec if body is None else body.applied_to(job.spec)
    require_scopes(principal, spec)
    created = create_job(services, principal, Order(spec, token, idempotency_key, retry_of=job.id))
    status = 202 if created.is_new else 200
    return answer(created.job, status=status, headers={"Location": f"/v1/jobs/{created.job.id}"})


@router.delete("/{job_id}", status_code=204)
def delete_job(job_id: str, services: ServicesParam, principal: JobsWriter) -> None:
    """Remove a job that has ended, with its events, report and checkpoints. Its artifacts stay."""
    services.outcome.settle(services.jobs.get(principal.tenant, job_id).id)
    job = services.jobs.delete(principal.tenant, job_id)
    services.idempotency.spend(job.id)
    services.objects.delete(report_key(job.id))
    services.objects.delete_prefix(checkpoint_prefix(job.id))
