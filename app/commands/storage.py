"""Commands about storage: gc."""

from __future__ import annotations

from typing import Annotated

import typer

from app.commands.terminal import Service, print_json, stdout


def gc(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what to be removed.")] = False,
    service: Service,
) -> None:
    """Remove unreferenced data: incomplete uploads, checkpoints of ended jobs, expired records."""
    with service.connect() as client:
        collected = client.collect_garbage(dry_run=dry_run)
    if service.as_json:
        print_json(collected.model_dump(mode="json"))
        return
    console = stdout()
    names = (*collected.checkpoints, *collected.artifacts, *collected.jobs, *collected.datasets)
    for name in names:
        console.print(name)
    console.print(f"{len(names)} {'to be removed' if dry_run else 'removed'}")
