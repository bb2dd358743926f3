"""Commands about webhooks: list, repeat, and the secret that signs them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from app.commands.help_pages import CommandGroup
from app.commands.lists import print_page
from app.commands.option_groups import option
from app.commands.short_ids import AS_ID, JobId, delivery_id, job_id
from app.commands.show import age_text
from app.commands.terminal import (
    After,
    Limit,
    Service,
    Yes,
    confirm,
    print_json,
    stdout,
    table,
)

if TYPE_CHECKING:
    from app.client.views import DeliveryAnswer

webhooks = CommandGroup("List and repeat webhooks; show or replace their secret.", no_args_is_help=True)


@webhooks.command("list")
def list_deliveries(
    context: typer.Context,
    job: Annotated[
        str | None,
        typer.Argument(
            metavar="JOB", help=f"A job: {AS_ID}; without it the newest of all jobs.", show_default=False
        ),
    ] = None,
    *,
    state: Annotated[
        str | None,
        option("Only webhooks in this state, of all jobs.", values=("pending", "delivered", "failed")),
    ] = None,
    limit: Limit = 20,
    after: After = None,
    service: Service,
) -> None:
    """List webhooks with their tries: of a job, oldest first, or the newest of all jobs."""
    if job is not None:
        for name, value in (("--state", state), ("--after", after)):
            if value is not None:
                raise typer.BadParameter("it is for the list of all jobs", param_hint=name)
    with service.connect() as client:
        if job is None:
            page = client.recent_webhook_deliveries(state=state, limit=limit, after=after)
        else:
            page = client.webhook_deliveries(job_id(client, job))
    print_page(page, show_deliveries, context, as_json=service.as_json)


def show_deliveries(console: Console, deliveries: Iterable[DeliveryAnswer]) -> None:
    grid = table("!webhook", "!state", "!type", ">tries", "?!age", "?last answer", "?!job")
    for delivery in deliveries:
        last = delivery.tries[-1] if delivery.tries else {}
        grid.add_row(
            delivery.id, delivery.state, delivery.type, str(len(delivery.tries)),
            age_text(delivery.created_at),
            escape(str(last.get("error") or last.get("status") or "")), delivery.job,
        )  # fmt: skip
    console.print(grid)


@webhooks.command("repeat")
def repeat_delivery(
    job: JobId,
    delivery: Annotated[str, typer.Argument(metavar="WEBHOOK", help="Its id, the start of it, or `last`.")],
    *,
    service: Service,
) -> None:
    """Send a webhook again, with the same id."""
    with service.connect() as client:
        whole = job_id(client, job)
        sent = client.redeliver(whole, delivery_id(client, whole, delivery))
    if service.as_json:
        print_json(sent.model_dump(mode="json"))
    else:
        stdout().print(f"{sent.id} {sent.state} {escape(sent.url)}")


@webhooks.command("secret")
def show_secret(
    *,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Replace it; for a day, webhooks are signed with both.")
    ] = False,
    yes: Yes = False,
    service: Service,
) -> None:
    """Print the secret that signs your tenant's webhooks."""
    if rotate:
        confirm("replace the secret of the webhooks?", yes=yes)
    with service.connect() as client:
        answer = client.rotate_webhook_secret() if rotate else client.webhook_secret()
    if service.as_json:
        print_json(answer.model_dump(mode="json"))
    else:
        stdout().print(escape(answer.secret))
