"""`nibble open`: the dashboard in the browser, signed in."""

from __future__ import annotations

import webbrowser
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from app.commands.short_ids import LAST, artifact_id, deployment_of, job_id
from app.commands.terminal import Service, print_json, stdout

if TYPE_CHECKING:
    from app.client import NibbleClient


def open_dashboard(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="JOB|ARTIFACT|NAME",
            help="A job (`last`: the newest), an artifact or a deployment; without it the list of jobs.",
            show_default=False,
        ),
    ] = None,
    *,
    service: Service,
) -> None:
    """Open the dashboard, or one of its pages, in the browser, signed in.

    Prints the link where no browser can be opened. It can be used once, within ten minutes.
    """
    with service.connect() as client:
        page = page_of(client, what)
        link = login_link(client, page)
    if service.as_json:
        print_json({"url": link})
    else:
        open_link(link)


def page_of(client: NibbleClient, what: str | None) -> str:
    """The page of the dashboard that shows it. Raises NotFound if it does not exist."""
    if what is None:
        return "/jobs"
    if what == LAST or what.startswith("job_"):
        return f"/jobs/{client.job(job_id(client, what)).id}"
    if what.startswith("art_"):
        return f"/artifacts/{client.artifact(artifact_id(client, what)).id}"
    return f"/deployments/{deployment_of(client, what).name}/chat"


def open_page(client: NibbleClient, page: str) -> None:
    open_link(login_link(client, page))


def login_link(client: NibbleClient, page: str) -> str:
    """A browser carries what follows the # along when it is sent on from the login."""
    return f"{client.url}{client.login_link().path}#{page}"


def open_link(link: str) -> None:
    if not webbrowser.open(link):
        stdout().print(escape(link))
