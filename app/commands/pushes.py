"""Where artifacts go: pushes to the hub, tags, the versions of each model."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from app.commands.hub_token import HubTokenOption, read_hub_token
from app.commands.lists import print_page
from app.commands.option_groups import without_none
from app.commands.progress import progress_view
from app.commands.short_ids import ArtifactId, artifact_id, require_own
from app.commands.show import age_text, print_answer, recipe_text, show_artifact
from app.commands.terminal import (
    After,
    ExitCode,
    Service,
    human_bytes,
    show_fault,
    table,
)
from app.core.records.job import Progress

if TYPE_CHECKING:
    from rich.console import Console

    from app.client import NibbleClient
    from app.client.views import PushAnswer, VersionsAnswer


def push(
    artifact: ArtifactId,
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="A hub repository, account/name.")],
    *,
    public: Annotated[
        bool, typer.Option("--public/--private", help="Visibility of a new repository.")
    ] = False,
    branch: Annotated[
        str | None,
        typer.Option(help="Branch, created if it is missing; default main.", show_default=False),
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Message of the commit.", show_default=False)
    ] = None,
    hub_token: HubTokenOption = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is pushed.")] = True,
    service: Service,
) -> None:
    """Push an artifact to the hub, with a model card."""
    body = {"repo_id": repo_id, "private": not public}
    body |= without_none(
        {"revision": branch, "commit_message": message, "hub_token": read_hub_token(hub_token)}
    )
    with service.connect() as client:
        state = client.push(artifact_id(client, artifact), body)
        if wait:
            state = await_push(client, state, service.console)
    print_answer(state, show_push, as_json=service.as_json)
    if state.state == "failed":
        raise typer.Exit(ExitCode.FAILED)


def await_push(client: NibbleClient, push: PushAnswer, console: Console) -> PushAnswer:
    """Show the push's progress until it has ended."""
    size = max(client.artifact(push.artifact).size, 1)
    with progress_view(console) as view, closing(client.follow_push(push.artifact, push.id)) as changes:
        for push in changes:
            said = f"{push.state}: {push.error.message}" if push.error is not None else push.state
            view.show(said, Progress(fraction=min(push.sent_bytes / size, 1.0)))
    return push


def show_push(console: Console, push: PushAnswer) -> None:
    console.print(f"{push.id}  {push.state}  {escape(push.commit_url or push.repo_id)}")
    if push.error is not None:
        show_fault(console, push.error)


def tag(
    artifact: ArtifactId,
    tags: Annotated[
        list[str] | None, typer.Argument(metavar="TAG...", help="Tags to give it.", show_default=False)
    ] = None,
    *,
    remove: Annotated[
        list[str] | None,
        typer.Option("--remove", help="A tag to remove; repeatable.", show_default=False),
    ] = None,
    service: Service,
) -> None:
    """Give tags to an artifact: a tag moves from the model's other versions to this one."""
    with service.connect() as client:
        whole = artifact_id(client, artifact)
        if remove:
            before = client.artifact(whole)
            require_own(remove, before.tags, "tag", before.id)
        changed = client.change_tags(whole, add=tags or (), remove=remove or ())
    print_answer(changed, show_artifact, as_json=service.as_json)


def registry(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Only this source model.", show_default=False)
    ] = None,
    *,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Artifacts to look at, newest first.")] = 200,
    after: After = None,
    service: Service,
) -> None:
    """List the versions of each model: what was made of it, with tags and pushes."""
    with service.connect() as client:
        page = client.registry(model=model, limit=limit, after=after)
    print_page(page, show_registry, context, as_json=service.as_json)


def show_registry(console: Console, models: Iterable[VersionsAnswer]) -> None:
    for each in models:
        console.print(f"[bold]{escape(each.model)}[/]")
        grid = table("!artifact", "recipe", ">size", "tags", "?pushed to", "?!age", "?format")
        for version in each.versions:
            grid.add_row(
                version.id,
                recipe_text(version.recipe),
                human_bytes(version.size),
                escape(", ".join(version.tags)),
                escape(", ".join(push.repo_id for push in version.pushes if push.state == "pushed")),
                age_text(version.created_at),
                version.format,
            )
        console.print(grid)
