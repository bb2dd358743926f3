"""Commands about a job's webhooks: list, repeat, and the secret that signs them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from app.commands.help_pages import HelpfulCommand, group
from app.commands.short_ids import JobId, delivery_id, job_id
from app.commands.show import age_text
from app.commands.terminal import ApiKey, AsJson, Url, Yes, confirm, connect, print_json, stdout, table

webhooks = group("List and repeat a job's webhooks; show or replace their secret.", no_args_is_help=True)


@webhooks.command("list", cls=HelpfulCommand)
def list_deliveries(job: JobId, *, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """List a job's webhooks with their tries, oldest first."""
    with connect(url, api_key) as client:
        page = client.webhook_deliveries(job_id(client, job))
    if as_json:
        print_json(page.model_dump(mode="json", by_alias=True))
        return
    if not page.items:
        stdout().print("none: `nibble submit MODEL --webhook URL` asks for them")
        return
    grid = table("!webhook", "!state", "!type", ">tries", "?!age", "?last answer")
    for delivery in page.items:
        last = delivery.tries[-1] if delivery.tries else {}
        grid.add_row(
            delivery.id, delivery.state, delivery.type, str(len(delivery.tries)),
            age_text(delivery.created_at),
            escape(str(last.get("error") or last.get("status") or "")),
        )  # fmt: skip
    stdout().print(grid)


@webhooks.command("repeat", cls=HelpfulCommand)
def repeat_delivery(
    job: JobId,
    delivery: Annotated[str, typer.Argument(metavar="WEBHOOK", help="Its id, the start of it, or `last`.")],
    *,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Send a webhook again, with the same id."""
    with connect(url, api_key) as client:
        whole = job_id(client, job)
        sent = client.redeliver(whole, delivery_id(client, whole, delivery))
    if as_json:
        print_json(sent.model_dump(mode="json"))
    else:
        stdout().print(f"{sent.id} {sent.state} {escape(sent.url)}")


@webhooks.command("secret", cls=HelpfulCommand)
def show_secret(
    *,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Replace it; for a day, webhooks are signed with both.")
    ] = False,
    yes: Yes = False,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Print the secret that signs your tenant's webhooks."""
    if rotate:
        confirm("replace the secret of the webhooks?", yes=yes)
    with connect(url, api_key) as client:
        answer = client.rotate_webhook_secret() if rotate else client.webhook_secret()
    if as_json:
        print_json(answer.model_dump(mode="json"))
    else:
        stdout().print(escape(answer.secret))
