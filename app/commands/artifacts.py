"""Commands about artifacts: list, show, download, delete."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from app.commands.help_pages import CommandGroup
from app.commands.lists import print_page
from app.commands.progress import progress_view
from app.commands.short_ids import ArtifactId, artifact_id
from app.commands.show import print_answer, show_artifact, show_artifacts
from app.commands.terminal import (
    After,
    Limit,
    Service,
    Yes,
    confirm,
    print_json,
    stdout,
)
from app.core.records.counted import counted
from app.core.records.job import Progress

artifacts = CommandGroup("List, show, download, share and delete artifacts.")


@artifacts.callback()
def list_artifacts(
    context: typer.Context,
    *,
    limit: Limit = 20,
    after: After = None,
    tag: Annotated[str | None, typer.Option(help="Only artifacts with this tag.", show_default=False)] = None,
    service: Service,
) -> None:
    """List artifacts, newest first."""
    if context.invoked_subcommand is not None:
        return
    with service.connect() as client:
        page = client.artifacts(limit=limit, after=after, tag=tag)
    print_page(page, show_artifacts, context, as_json=service.as_json)


@artifacts.command()
def show(artifact: ArtifactId, *, service: Service) -> None:
    """List an artifact's files with their SHA-256."""
    with service.connect() as client:
        answer = client.artifact(artifact_id(client, artifact))
    print_answer(answer, show_artifact, as_json=service.as_json)


@artifacts.command()
def download(
    artifact: ArtifactId,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to; created if missing.")],
    service: Service,
) -> None:
    """Download an artifact; each file's SHA-256 is checked before it appears in the folder.

    An interrupted download is resumed.
    """
    console = service.console
    with service.connect() as client:
        whole = artifact_id(client, artifact)
        size = max(client.artifact(whole).size, 1)
        received = 0
        with progress_view(console) as view:

            def on_bytes(count: int) -> None:
                nonlocal received
                received += count
                view.show("downloading", Progress(fraction=min(received / size, 1.0)))

            answer = client.download(whole, out, on_bytes=on_bytes)
    if service.as_json:
        print_json({**answer.model_dump(mode="json"), "folder": str(out)})
    else:
        console.print(f"{counted(len(answer.files), 'file')} in {escape(str(out))}")


@artifacts.command()
def link(
    artifact: ArtifactId,
    path: Annotated[
        str, typer.Argument(metavar="FILE", help="A file of it, as `nibble artifacts show` lists.")
    ],
    *,
    hours: Annotated[int, typer.Option(min=1, max=168, help="Hours until the link ends.")] = 1,
    service: Service,
) -> None:
    """Print a link that reads one file without a key."""
    with service.connect() as client:
        answer = client.link(artifact_id(client, artifact), path, expires_in_s=hours * 3600)
        whole = answer.url if "://" in answer.url else client.url + answer.url
    if service.as_json:
        print_json({"url": whole, "expires_at": answer.expires_at.isoformat()})
    else:
        stdout().print(escape(whole))


@artifacts.command()
def delete(
    artifact: ArtifactId,
    *,
    force: Annotated[bool, typer.Option("--force", help="Also if it has tags.")] = False,
    yes: Yes = False,
    service: Service,
) -> None:
    """Remove an artifact and its files. Delete deployments that serve it first."""
    with service.connect() as client:
        whole = artifact_id(client, artifact)
        confirm(f"delete {whole} and its files?", yes=yes)
        client.delete_artifact(whole, force=force)
    if service.as_json:
        print_json({"id": whole, "deleted": True})
    else:
        stdout().print(f"{escape(whole)} is deleted")
