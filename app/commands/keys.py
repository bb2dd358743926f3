"""Commands about API keys and browser logins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from app.commands.help_pages import CommandGroup
from app.commands.lists import print_page
from app.commands.short_ids import key_id
from app.commands.terminal import (
    Service,
    Yes,
    confirm,
    print_json,
    stdout,
    table,
)

if TYPE_CHECKING:
    from app.client.views import KeyAnswer

keys = CommandGroup("Create, list and revoke API keys.", no_args_is_help=True)


@keys.command()
def create(
    *,
    scopes: Annotated[str, typer.Option(help="Comma-separated, such as jobs:read,jobs:write.")],
    tenant: Annotated[
        str | None, typer.Option(help="Tenant of the key; default: your own.", show_default=False)
    ] = None,
    name: Annotated[str, typer.Option(help="A label shown in the list.")] = "",
    days: Annotated[
        int | None, typer.Option(min=1, max=3650, help="Days until it expires.", show_default=False)
    ] = None,
    service: Service,
) -> None:
    """Create a key and print it. It is shown only once."""
    body = {
        "tenant": tenant,
        "scopes": [scope.strip() for scope in scopes.split(",") if scope.strip()],
        "name": name,
        "expires_in_s": days * 24 * 3600 if days is not None else None,
    }
    with service.connect() as client:
        created = client.create_key(body)
    if service.as_json:
        print_json(created.model_dump(mode="json"))
    else:
        stdout().print(escape(created.key))


@keys.command("list")
def list_keys(
    context: typer.Context,
    *,
    tenant: Annotated[str | None, typer.Option(help="Only keys of this tenant.", show_default=False)] = None,
    service: Service,
) -> None:
    """List keys with their tenant, scopes and last use."""
    with service.connect() as client:
        page = client.keys(tenant=tenant)
    print_page(page, show_keys, context, as_json=service.as_json)


def show_keys(console: Console, keys: Iterable[KeyAnswer]) -> None:
    grid = table("!id", "name", "scopes", "tenant", "?!expires", "?!last used", "?!created")
    for key in keys:
        moments = [key.expires_at, key.last_used_at, key.created_at]
        shown = [f"{moment:%Y-%m-%d}" if moment else "-" for moment in moments]
        grid.add_row(key.id, escape(key.name), " ".join(key.scopes), key.tenant, *shown)
    console.print(grid)


@keys.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY_ID", help="The id in `nibble keys list`, or its start.")],
    *,
    yes: Yes = False,
    service: Service,
) -> None:
    """Revoke a key: whoever uses it is refused from now on."""
    with service.connect() as client:
        whole = key_id(client, key)
        confirm(f"revoke the key {whole}?", yes=yes)
        client.revoke_key(whole)
    if service.as_json:
        print_json({"id": whole, "revoked": True})
    else:
        stdout().print(f"revoked {escape(whole)}")


def login(*, service: Service) -> None:
    """Print a link that logs a browser in, once, within ten minutes."""
    with service.connect() as client:
        link = client.login_link()
    if service.as_json:
        print_json({"url": client.url + link.path, "expires_at": link.expires_at.isoformat()})
    else:
        stdout().print(escape(client.url + link.path))
