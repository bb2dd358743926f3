"""Commands about access: keys, and the link that logs a browser in."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from app.commands.terminal import ApiKey, AsJson, Url, connect, print_json, stdout, table

keys = typer.Typer(help="Create, list and revoke API keys.", no_args_is_help=True)


@keys.command()
def create(
    *,
    scopes: Annotated[str, typer.Option(help="Comma-separated, such as jobs:read,jobs:write.")],
    tenant: Annotated[
        str | None, typer.Option(help="Whose resources it sees; your own if absent.", show_default=False)
    ] = None,
    name: Annotated[str, typer.Option(help="A note for the list.")] = "",
    days: Annotated[
        int | None, typer.Option(min=1, max=3650, help="Days until it expires.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Create a key and print it: this is the only time."""
    body = {
        "tenant": tenant,
        "scopes": [scope.strip() for scope in scopes.split(",") if scope.strip()],
        "name": name,
        "expires_in_s": days * 24 * 3600 if days is not None else None,
    }
    with connect(url, api_key) as client:
        made = client.create_key(body)
    if as_json:
        print_json(made.model_dump(mode="json"))
    else:
        stdout().print(escape(made.key))


@keys.command("list")
def list_keys(
    *,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.", show_default=False)] = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """List keys: whose, what they may do, when they were used last."""
    with connect(url, api_key) as client:
        found = client.keys(tenant=tenant)
    if as_json:
        print_json(found.model_dump(mode="json", by_alias=True))
        return
    grid = table("id", "tenant", "name", "scopes", "created", "expires", "last used")
    for key in found.items:
        moments = [key.created_at, key.expires_at, key.last_used_at]
        shown = [f"{moment:%Y-%m-%d %H:%M}" if moment else "-" for moment in moments]
        grid.add_row(key.id, key.tenant, escape(key.name), " ".join(key.scopes), *shown)
    stdout().print(grid)


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID", help="The id in `nibble keys list`.")],
    *,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Refuse a key from now on."""
    with connect(url, api_key) as client:
        client.revoke_key(key_id)
    if as_json:
        print_json({"id": key_id, "revoked": True})
    else:
        stdout().print(f"revoked {escape(key_id)}")


def login(*, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """Print a link that logs a browser in, once, within ten minutes."""
    with connect(url, api_key) as client:
        link = client.login_link()
    if as_json:
        print_json({"url": client.url + link.path, "expires_at": link.expires_at.isoformat()})
    else:
        stdout().print(escape(client.url + link.path))
