"""Commands for operators: limits of tenants, and the record of changes."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from app.commands.lists import print_page
from app.commands.option_groups import option, without_none
from app.commands.show import age_text, print_answer
from app.commands.terminal import After, Service, human_bytes, table
from app.core.errors import InvalidRequest
from app.core.records.forms import written_time

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from app.client.views import AuditAnswer, LimitsAnswer

# A limit, the figure of use beside it, and what both are called.
FIGURES = (
    ("active_jobs", "active_jobs", "queued and running jobs"),
    ("running_jobs", "running_jobs", "running jobs"),
    ("storage_bytes", "storage_bytes", "storage"),
    ("requests_per_minute", "", "requests per minute"),
)
Count = Annotated[int | None, typer.Option(min=0, help="Most at a time; 0: no limit.", show_default=False)]


def limits(
    tenant: Annotated[
        str,
        typer.Argument(metavar="TENANT", help="Only operators may name another tenant than their own."),
    ],
    *,
    active_jobs: Count = None,
    running_jobs: Count = None,
    storage: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Such as 500GB; 0: no limit.", show_default=False)
    ] = None,
    requests_per_minute: Count = None,
    service: Service,
) -> None:
    """Show a tenant's limits and what it uses; with options, set those limits (operators)."""
    changes = without_none(
        {
            "active_jobs": active_jobs,
            "running_jobs": running_jobs,
            "storage_bytes": None if storage is None else byte_count(storage),
            "requests_per_minute": requests_per_minute,
        }
    )
    with service.connect() as client:
        answer = client.tenant_limits(tenant)
        if changes:
            answer = client.set_tenant_limits(tenant, {**answer.limits, **changes})
    print_answer(answer, show_limits, as_json=service.as_json)


def byte_count(written: str) -> int:
    """The bytes of `500GB`. Raises InvalidRequest."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(written))
    except ValidationError as fault:
        raise InvalidRequest(
            f"--storage {written} is not a size",
            code="size_invalid",
            remedy="write it as 500GB or 2TB, or 0 for no limit",
        ) from fault


def show_limits(console: Console, answer: LimitsAnswer) -> None:
    grid = table(f"!{answer.tenant}", ">used", ">limit")
    for limit, usage, name in FIGURES:
        most = answer.limits.get(limit) or None  # 0 is none
        grid.add_row(name, amount(usage, answer.usage.get(usage)), amount(limit, most) or "none")
    console.print(grid)


def amount(name: str, count: int | None) -> str:
    if count is None:
        return ""
    return human_bytes(count) if name.endswith("bytes") else str(count)


def audit(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="WORD...", help="Only entries with all these words.", show_default=False),
    ] = None,
    *,
    key: Annotated[str | None, option("Only entries of the key with this id.", metavar="KEY_ID")] = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            metavar="DATE",
            parser=written_time,
            help="Only since then; without a zone it is UTC.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Entries to list, newest first.")] = 20,
    after: After = None,
    service: Service,
) -> None:
    """List changes and logins: when, with which key, what, and how it was answered; newest first."""
    with service.connect() as client:
        page = client.audit(" ".join(words or ()) or None, key=key, since=since, limit=limit, after=after)
    print_page(page, show_audit, context, as_json=service.as_json)


def show_audit(console: Console, entries: Iterable[AuditAnswer]) -> None:
    grid = table("!age", ">status", "!change", "!what", "?!key", "?detail")
    for entry in entries:
        moment = age_text(entry.at) if entry.at is not None else ""
        grid.add_row(
            moment, str(entry.status), entry.method, escape(entry.path.removeprefix("/v1/")), entry.key_id,
            escape(entry.detail),
        )  # fmt: skip
    console.print(grid)
