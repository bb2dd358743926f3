"""Commands about jobs and workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands import job_options
from app.commands.gains import show_outcome
from app.commands.hub_token import HubTokenOption, read_hub_token
from app.commands.lists import print_page
from app.commands.option_groups import among, without_none
from app.commands.served_speed import served_speed
from app.commands.short_ids import JobId, job_id
from app.commands.show import (
    print_answer,
    show_estimate,
    show_event,
    show_job,
    show_jobs,
    show_log_line,
    show_report,
    show_workers,
)
from app.commands.terminal import (
    After,
    ExitCode,
    Limit,
    Service,
    print_json,
    stderr,
    stdout,
)
from app.commands.watching import watch_job
from app.core.errors import NibbleError
from app.core.records.job import JobState

if TYPE_CHECKING:
    from rich.console import Console

    from app.client import EventAnswer, JobAnswer, NibbleClient

ModelName = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="org/name, hf:org/name@revision, s3://…, file://… or a folder."),
]


def submit(
    model: ModelName = None,
    *,
    options: job_options.JobOptions,
    labels: job_options.Labels = None,
    idempotency_key: job_options.IdempotencyKey = None,
    timeout: job_options.Timeout = None,
    queue_timeout: job_options.QueueTimeout = None,
    priority: job_options.PriorityName = None,
    webhook: job_options.Webhook = None,
    deploy: job_options.Deploy = None,
    push: job_options.PushTo = None,
    force: job_options.Force = False,
    hub_token: HubTokenOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show progress until the job ends.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the job's page in the browser.")] = False,
    service: Service,
) -> None:
    """Submit a job: quantize a model.

    MODEL is a repository on the hub, a folder, or an s3:// or file:// address. What no option says is left to
    the service: 4 bits with AWQ.
    """
    body = job_options.job_body(model, options, job_options.split_labels(labels))
    body |= without_none(
        {
            "timeout_s": timeout,
            "queue_timeout_s": queue_timeout,
            "priority": priority,
            "webhook": None if webhook is None else {**(body.get("webhook") or {}), "url": webhook},
            "deploy": None if deploy is None else {**(body.get("deploy") or {}), "name": deploy},
            "push": None if push is None else {**(body.get("push") or {}), "repo_id": push},
            "force": True if force else None,
            "hub_token": read_hub_token(hub_token),
        }
    )
    with service.connect() as client:
        job = client.submit(body, idempotency_key=idempotency_key)
        if open_page:
            open_job(client, job.id)
        if watch:
            follow(client, job.id, as_json=service.as_json)
        elif service.as_json:
            print_json(job.model_dump(mode="json"))
        else:
            show_job(stdout(), job)
            show_next_steps(stdout(), job)


def open_job(client: NibbleClient, job: str) -> None:
    from app.commands.opening import open_page

    open_page(client, f"/jobs/{job}")


def show_next_steps(console: Console, job: JobAnswer) -> None:
    """What can be done with a new job; with one whose result was there already."""
    if job.is_terminal:
        if job.reused_from is not None:
            console.print(f"{job.reused_from} has this result already; --force computes it again")
        steps = [(f"nibble report {job.id}", "what was won")]
    else:
        steps = [
            (f"nibble watch {job.id}", "its progress"),
            (f"nibble logs {job.id} -f", "what it does"),
            (f"nibble cancel {job.id}", "stop it"),
        ]
    for command, purpose in steps:
        console.print(f"  {command}  [dim]{purpose}[/]")


def watch(job: JobId, *, service: Service) -> None:
    """Show a job's progress until it ends, then what was won. With --json: one line for each change."""
    with service.connect() as client:
        follow(client, job_id(client, job), as_json=service.as_json)


def follow(client: NibbleClient, whole: str, *, as_json: bool) -> None:
    """Show the job's end. Exits with 1 unless it succeeded."""
    job: JobAnswer | None = None
    if as_json:
        for job in client.follow(whole):
            print_json(job.model_dump(mode="json"))
    else:
        console = stdout()
        try:
            job = watch_job(client, whole, console)
        except KeyboardInterrupt:
            stderr().print(f"the job goes on; nibble watch {whole} shows it")
            stderr().print(f"nibble cancel {whole} stops it")
            raise
        show_end(client, job, console)
    if job is None or job.state != "succeeded":
        raise typer.Exit(ExitCode.FAILED)


def show_end(client: NibbleClient, job: JobAnswer, console: Console) -> None:
    """The ended job, what was won, and what can be done next."""
    show_job(console, job)
    if job.state != "succeeded":
        console.print(f"what it did before that: nibble report {job.id}")
        return
    speed = partial(served_speed, client, job.id)
    show_outcome(console, report_or_nothing(client, job.id), speed)
    console.print(f"all figures: nibble report {job.id}")
    if job.artifacts and not job.spec.get("deploy"):
        console.print(f"serve it: nibble deploy {job.artifacts[0]} --name NAME")


def report_or_nothing(client: NibbleClient, whole: str) -> dict[str, Any]:
    """The report; nothing where it can't be read: the job has succeeded all the same."""
    try:
        return client.report(whole)
    except NibbleError:
        return {}


def jobs(
    context: typer.Context,
    *,
    state: Annotated[
        str | None,
        typer.Option(help="Only jobs in this state.", show_default=False, autocompletion=among(*JobState)),
    ] = None,
    label: Annotated[str | None, typer.Option(help="Only jobs with key=value.", show_default=False)] = None,
    limit: Limit = 20,
    after: After = None,
    service: Service,
) -> None:
    """List jobs, newest first."""
    with service.connect() as client:
        page = client.jobs(state=state, label=label, limit=limit, after=after)
    print_page(page, show_jobs, context, as_json=service.as_json)


def cancel(job: JobId, *, service: Service) -> None:
    """Cancel a queued or running job."""
    with service.connect() as client:
        cancelled = client.cancel(job_id(client, job))
    print_answer(cancelled, show_job, as_json=service.as_json)


def retry(
    job: JobId,
    *,
    timeout: job_options.Timeout = None,
    force: job_options.Force = False,
    hub_token: HubTokenOption = None,
    service: Service,
) -> None:
    """Run an ended job again, as a new job; a failed one goes on after its last finished layer."""
    token = read_hub_token(hub_token)
    with service.connect() as client:
        again = client.retry(job_id(client, job), hub_token=token, timeout_s=timeout, force=force)
    print_answer(again, show_job, as_json=service.as_json)
    if not service.as_json:
        show_next_steps(stdout(), again)


def events(job: JobId, *, service: Service) -> None:
    """Show a job's events, past and future, until it ends."""
    with service.connect() as client:
        print_events(client.events(job_id(client, job)), show_event, as_json=service.as_json)


def logs(
    job: JobId,
    *,
    follow_on: Annotated[bool, typer.Option("--follow", "-f", help="Follow until the job ends.")] = False,
    service: Service,
) -> None:
    """Print what a job did, line by line, and what its process wrote if it crashed."""
    with service.connect() as client:
        whole = job_id(client, job)
        lines = client.events(whole) if follow_on else past_events(client, whole)
        print_events(lines, show_log_line, as_json=service.as_json)


def past_events(client: NibbleClient, whole: str) -> Iterator[EventAnswer]:
    """What has happened until now, oldest first."""
    after: str | None = None
    while True:
        page = client.event_page(whole, after=after, limit=1000)
        yield from page.items
        if not page.has_more:
            return
        after = page.next  # never null here, also of the last page


def print_events(
    listed: Iterable[EventAnswer], show: Callable[[Console, EventAnswer], None], *, as_json: bool
) -> None:
    console = stdout()
    for event in listed:
        if as_json:
            print_json(event.model_dump(mode="json"))
        else:
            show(console, event)


def workers(context: typer.Context, *, service: Service) -> None:
    """List the live workers with their host, device and status."""
    with service.connect() as client:
        page = client.workers()
    print_page(page, show_workers, context, as_json=service.as_json)


def report(job: JobId, *, service: Service) -> None:
    """Show a job's report: perplexities, sizes, seconds, and what was won."""
    with service.connect() as client:
        whole = job_id(client, job)
        document = client.report(whole)
        if service.as_json:
            print_json(document)
        else:
            console = stdout()
            show_report(console, document)
            show_outcome(console, document, partial(served_speed, client, whole))


def export(job: JobId, *, service: Service) -> None:
    """Print a job's params, metrics and tags as flat JSON, for experiment trackers."""
    with service.connect() as client:
        document = client.export(job_id(client, job))
    if service.as_json:
        print_json(document)
    else:
        stdout().print_json(data=document)


def estimate(
    model: ModelName = None,
    *,
    options: job_options.JobOptions,
    hub_token: HubTokenOption = None,
    service: Service,
) -> None:
    """Predict a job's time, memory and size without running it."""
    body = job_options.job_body(model, options)
    body |= without_none({"hub_token": read_hub_token(hub_token)})
    with service.connect() as client:
        document = client.estimate(body)
    if service.as_json:
        print_json(document)
    else:
        show_estimate(stdout(), document)
