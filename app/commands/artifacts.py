"""Commands about artifacts: list, show, download, delete."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from app.commands.help_pages import HelpfulCommand, group
from app.commands.progress import progress_view
from app.commands.short_ids import ArtifactId, artifact_id
from app.commands.show import print_answer, print_page, show_artifact, show_artifacts
from app.commands.terminal import (
    After,
    ApiKey,
    AsJson,
    Limit,
    Url,
    Yes,
    confirm,
    connect,
    print_json,
    stderr,
    stdout,
)
from app.core.records.job import Progress

artifacts = group("List, show, download, share and delete artifacts.")


@artifacts.callback(invoke_without_command=True)
def list_artifacts(
    context: typer.Context,
    *,
    limit: Limit = 20,
    after: After = None,
    tag: Annotated[str | None, typer.Option(help="Only artifacts with this tag.", show_default=False)] = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """List artifacts, newest first."""
    if context.invoked_subcommand is not None:
        return
    with connect(url, api_key) as client:
        page = client.artifacts(limit=limit, after=after, tag=tag)
    print_page(page, show_artifacts, as_json=as_json, command="nibble artifacts")


@artifacts.command(cls=HelpfulCommand)
def show(artifact: ArtifactId, *, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """List an artifact's files with their SHA-256."""
    with connect(url, api_key) as client:
        answer = client.artifact(artifact_id(client, artifact))
    print_answer(answer, show_artifact, as_json=as_json)


@artifacts.command(cls=HelpfulCommand)
def download(
    artifact: ArtifactId,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to; created if missing.")],
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Download an artifact; each file's SHA-256 is checked before it appears in the folder.

    An interrupted download is resumed.
    """
    console = stderr() if as_json else stdout()
    with connect(url, api_key) as client:
        whole = artifact_id(client, artifact)
        size = max(client.artifact(whole).size, 1)
        received = 0
        with progress_view(console) as view:

            def on_bytes(count: int) -> None:
                nonlocal received
                received += count
                view.show("downloading", Progress(fraction=min(received / size, 1.0)))

            answer = client.download(whole, out, on_bytes=on_bytes)
    if as_json:
        print_json({**answer.model_dump(mode="json"), "folder": str(out)})
    else:
        console.print(f"{len(answer.files)} files in {escape(str(out))}")


@artifacts.command(cls=HelpfulCommand)
def link(
    artifact: ArtifactId,
    path: Annotated[
        str, typer.Argument(metavar="FILE", help="A file of it, as `nibble artifacts show` lists.")
    ],
    *,
    hours: Annotated[int, typer.Option(min=1, max=168, help="Hours until the link ends.")] = 1,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Print a link that reads one file without a key."""
    with connect(url, api_key) as client:
        answer = client.link(artifact_id(client, artifact), path, expires_in_s=hours * 3600)
        whole = answer.url if "://" in answer.url else client.url + answer.url
    if as_json:
        print_json({"url": whole, "expires_at": answer.expires_at.isoformat()})
    else:
        stdout().print(escape(whole))


@artifacts.command(cls=HelpfulCommand)
def delete(
    artifact: ArtifactId,
    *,
    force: Annotated[bool, typer.Option("--force", help="Also if it has tags.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Remove an artifact and its files. Delete deployments that serve it first."""
    with connect(url, api_key) as client:
        whole = artifact_id(client, artifact)
        confirm(f"delete {whole} and its files?", yes=yes)
        client.delete_artifact(whole, force=force)
    if as_json:
        print_json({"id": whole, "deleted": True})
    else:
        stdout().print(f"{escape(whole)} is gone")
