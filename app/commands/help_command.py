"""`nibble help`: the help of any command."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.commands.terminal import AsJson, print_json


def help_page(
    context: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND...", help="A command.", show_default=False)
    ] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Show the help of nibble, or of one command."""
    page: Any = context.find_root()
    for word in words or ():
        commands = getattr(page.command, "commands", {})
        if word not in commands:
            page.fail(f"No such command {word!r}.")
        page = type(page)(commands[word], info_name=word, parent=page)
    text = page.get_help()
    if as_json:
        print_json({"command": page.command_path, "help": text})
    else:
        typer.echo(text)
