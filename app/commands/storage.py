"""Commands about storage: gc."""

from __future__ import annotations

from typing import Annotated

import typer

from app.commands.terminal import ApiKey, AsJson, Url, connect, print_json, stdout


def gc(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Remove what nothing in storage refers to: half uploads, checkpoints of ended jobs, old records."""
    with connect(url, api_key) as client:
        found = client.collect_garbage(dry_run=dry_run)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    console = stdout()
    names = (*found.checkpoints, *found.artifacts, *found.jobs)
    for name in names:
        console.print(name)
    console.print(f"{len(names)} {'would be removed' if dry_run else 'removed'}")
