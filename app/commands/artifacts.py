"""Commands about artifacts: list, show, download, delete."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from app.commands.progress import progress_view
from app.commands.show import print_page, show_artifact, show_artifacts
from app.commands.terminal import After, ApiKey, AsJson, Limit, Url, connect, print_json, stderr, stdout
from app.core.records.job import Progress

ArtifactId = Annotated[str, typer.Argument(metavar="ARTIFACT", help="An artifact's id.")]

artifacts = typer.Typer(help="List, show, download and delete artifacts.", no_args_is_help=False)


@artifacts.callback(invoke_without_command=True)
def list_artifacts(
    context: typer.Context,
    *,
    limit: Limit = 20,
    after: After = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """List artifacts, newest first."""
    if context.invoked_subcommand is not None:
        return
    with connect(url, api_key) as client:
        page = client.artifacts(limit=limit, after=after)
    print_page(page, show_artifacts, as_json=as_json, command="nibble artifacts")


@artifacts.command()
def show(
    artifact_id: ArtifactId, *, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None
) -> None:
    """List an artifact's files with their SHA-256."""
    with connect(url, api_key) as client:
        artifact = client.artifact(artifact_id)
    if as_json:
        print_json(artifact.model_dump(mode="json"))
    else:
        show_artifact(stdout(), artifact)


@artifacts.command()
def download(
    artifact_id: ArtifactId,
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
        size = max(client.artifact(artifact_id).size, 1)
        received = 0
        with progress_view(console) as view:

            def on_bytes(count: int) -> None:
                nonlocal received
                received += count
                view.show("downloading", Progress(fraction=min(received / size, 1.0)))

            artifact = client.download(artifact_id, out, on_bytes=on_bytes)
    if as_json:
        print_json({**artifact.model_dump(mode="json"), "folder": str(out)})
    else:
        console.print(f"{len(artifact.files)} files in {escape(str(out))}")


@artifacts.command()
def delete(
    artifact_id: ArtifactId, *, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None
) -> None:
    """Remove an artifact and its files. Delete deployments that serve it first."""
    with connect(url, api_key) as client:
        client.delete_artifact(artifact_id)
    if as_json:
        print_json({"id": artifact_id, "deleted": True})
    else:
        stdout().print(f"{escape(artifact_id)} is gone")
