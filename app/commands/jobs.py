"""Commands about jobs and workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from app.commands import job_options
from app.commands.progress import progress_view
from app.commands.show import (
    print_page,
    show_estimate,
    show_event,
    show_job,
    show_jobs,
    show_report,
    show_workers,
)
from app.commands.terminal import (
    After,
    ApiKey,
    AsJson,
    ExitCode,
    Limit,
    Url,
    among,
    connect,
    print_json,
    stderr,
    stdout,
)
from app.core.records.job import JobState

if TYPE_CHECKING:
    from rich.console import Console

    from app.client import JobAnswer, NibbleClient

JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id.")]
ModelName = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="org/name, hf:org/name@revision, s3://…, file://… or a folder."),
]


@job_options.takes_job_options
def submit(
    model: ModelName = None,
    *,
    labels: job_options.Labels = None,
    idempotency_key: job_options.IdempotencyKey = None,
    timeout: job_options.Timeout = None,
    queue_timeout: job_options.QueueTimeout = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show progress until the job ends.")] = False,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
    options: job_options.JobOptions,
) -> None:
    """Submit a job."""
    body = job_options.job_body(model, options, job_options.split_labels(labels))
    body |= job_options.without_none({"timeout_s": timeout, "queue_timeout_s": queue_timeout})
    with connect(url, api_key) as client:
        job = client.submit(body, idempotency_key=idempotency_key)
        if watch:
            follow(client, job.id, as_json=as_json)
        elif as_json:
            print_json(job.model_dump(mode="json"))
        else:
            show_job(stdout(), job)


def watch(job_id: JobId, *, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """Show a job's progress until it ends. With --json: one line for each change."""
    with connect(url, api_key) as client:
        follow(client, job_id, as_json=as_json)


def follow(client: NibbleClient, job_id: str, *, as_json: bool) -> None:
    """Show the job's end. Exits with 1 unless it succeeded."""
    job: JobAnswer | None = None
    if as_json:
        for job in client.follow(job_id):
            print_json(job.model_dump(mode="json"))
    else:
        console = stdout()
        console.print(f"job {job_id}")
        try:
            job = watch_job(client, job_id, console)
        except KeyboardInterrupt:
            stderr().print(f"the job goes on: nibble watch {job_id} follows it")
            stderr().print(f"nibble cancel {job_id} stops it")
            raise
        show_job(console, job)
        said = "its figures" if job.state == "succeeded" else "what it did until then"
        console.print(f"{said}: nibble report {job_id}")
    if job is None or job.state != "succeeded":
        raise typer.Exit(ExitCode.FAILED)


def watch_job(client: NibbleClient, job_id: str, console: Console) -> JobAnswer:
    """Show progress until the job has ended; returns the ended job."""
    with progress_view(console) as view:
        for job in client.follow(job_id):
            view.show((job.stage if job.state == "running" else None) or job.state, job.progress)
    return job


def jobs(
    *,
    state: Annotated[
        str | None,
        typer.Option(help="Only jobs in this state.", show_default=False, autocompletion=among(*JobState)),
    ] = None,
    label: Annotated[str | None, typer.Option(help="Only jobs with key=value.", show_default=False)] = None,
    limit: Limit = 20,
    after: After = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """List jobs, newest first."""
    with connect(url, api_key) as client:
        page = client.jobs(state=state, label=label, limit=limit, after=after)
    print_page(page, show_jobs, as_json=as_json, command="nibble jobs")


def cancel(job_id: JobId, *, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """Cancel a queued or running job."""
    with connect(url, api_key) as client:
        job = client.cancel(job_id)
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        show_job(stdout(), job)


def retry(job_id: JobId, *, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """Run an ended job again, as a new job."""
    with connect(url, api_key) as client:
        job = client.retry(job_id)
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        show_job(stdout(), job)


def events(job_id: JobId, *, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """Show a job's events, past and future, until it ends."""
    console = stdout()
    with connect(url, api_key) as client:
        for event in client.events(job_id):
            if as_json:
                print_json(event.model_dump(mode="json"))
            else:
                show_event(console, event)


def workers(*, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """List the live workers with their host, device and status."""
    with connect(url, api_key) as client:
        page = client.workers()
    print_page(page, show_workers, as_json=as_json, command="nibble workers")


def report(job_id: JobId, *, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """Show a job's report: perplexities, sizes, seconds."""
    with connect(url, api_key) as client:
        document = client.report(job_id)
    if as_json:
        print_json(document)
    else:
        show_report(stdout(), document)


@job_options.takes_job_options
def estimate(
    model: ModelName = None,
    *,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
    options: job_options.JobOptions,
) -> None:
    """Predict a job's time, memory and size without running it."""
    body = job_options.job_body(model, options)
    with connect(url, api_key) as client:
        document = client.estimate(body)
    if as_json:
        print_json(document)
    else:
        show_estimate(stdout(), document)
