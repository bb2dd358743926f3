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
        found = client.document("POST", "/v1/gc", params={"dry_run": str(dry_run).lower()})
    if as_json:
        print_json(found)
        return
    console = stdout()
    for name in (*found["checkpoints"], *found["artifacts"], *found["jobs"]):
        console.print(name)
    count = sum(len(found[kind]) for kind in ("checkpoints", "artifacts", "jobs"))
    console.print(f"{count} {'would be removed' if dry_run else 'removed'}")
