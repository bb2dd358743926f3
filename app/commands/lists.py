"""Lists: the entries of a page, what to do where there is none, and the command for the next page."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from app.commands.short_ids import FIRST
from app.commands.terminal import print_json, stdout

if TYPE_CHECKING:
    from app.client.views import Page

# The cursor is another one, JSON has it as a field, and a key doesn't belong on a screen.
NOT_REPEATED = ("after", "as_json", "api_key")
# Hints for new users, shown for an empty list.
EMPTY = {
    "nibble jobs": FIRST["job"],
    "nibble artifacts": FIRST["artifact"],
    "nibble registry": FIRST["artifact"],
    "nibble datasets list": FIRST["dataset"],
    "nibble deployments": FIRST["deployment"],
    "nibble keys list": FIRST["key"],
    "nibble webhooks list": FIRST["webhook"],
    "nibble workers": "`nibble worker` starts one, `nibble up` all that this machine needs",
}
# Options that leave no entry out.
NO_FILTERS = ("limit", "url", "job", "sequence_length", *NOT_REPEATED)
ItemT = TypeVar("ItemT")


def print_page(
    page: Page[ItemT],
    show: Callable[[Console, Iterable[ItemT]], None],
    context: typer.Context,
    *,
    as_json: bool,
) -> None:
    """Print a page of a list; if more entries follow, also the command that lists them."""
    if as_json:
        print_json(page.model_dump(mode="json", by_alias=True))
        return
    console = stdout()
    hint = EMPTY.get(context.command_path)
    if page.items:
        show(console, page.items)
    elif hint is None or any(param.name not in NO_FILTERS for param in typed(context)):
        console.print("none")
    else:
        console.print(f"none: {hint}")
    if page.has_more and page.next is not None:
        console.print(f"more: {escape(shlex.join([*repeated(context), '--after', page.next]))}")


def repeated(context: typer.Context) -> Iterator[str]:
    """The words of the command with the arguments and options that were typed."""
    yield from context.command_path.split()
    for param in typed(context):
        if param.name not in NOT_REPEATED:
            value = context.params[param.name]
            name = [param.opts[-1]] if param.param_type_name == "option" else []
            for each in value if isinstance(value, list | tuple) else [value]:
                yield from (*name, each.isoformat() if isinstance(each, datetime) else str(each))


def typed(context: typer.Context) -> list[Any]:
    """The parameters that the command line names."""
    sources = [context.get_parameter_source(param.name or "") for param in context.command.params]
    return [
        param
        for param, source in zip(context.command.params, sources, strict=True)
        if source is not None and source.name == "COMMANDLINE"
    ]
