"""Lists: the entries of a page, what to do where there is none, and the command for the next page."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from app.commands.terminal import print_json, stdout

if TYPE_CHECKING:
    from app.client.views import Page

# Hints for new users, shown for an empty list.
EMPTY = {
    "nibble jobs": "`nibble submit MODEL` creates a job",
    "nibble artifacts": "a job publishes them when it succeeds",
    "nibble registry": "a job publishes artifacts when it succeeds",
    "nibble datasets list": "`nibble datasets upload FILE` stores one",
    "nibble deployments": "`nibble deploy ARTIFACT --name NAME` creates one",
    "nibble workers": "`nibble worker` starts one, `nibble up` all that this machine needs",
    "nibble keys list": "`nibble keys create --scopes jobs:read,jobs:write` creates one",
    "nibble webhooks list": "`nibble submit MODEL --webhook URL` asks for them",
}
# The cursor is another one, JSON has it as a field, and a key doesn't belong on a screen.
NOT_REPEATED = ("after", "as_json", "api_key")
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
    if page.items:
        show(console, page.items)
    else:
        hint = EMPTY.get(context.command_path, "")
        console.print("none" + (f": {hint}" if hint else ""))
    if page.has_more and page.next is not None:
        console.print(f"more: {escape(shlex.join([*repeated(context), '--after', page.next]))}")


def repeated(context: typer.Context) -> Iterator[str]:
    """The words of the command with the arguments and options that were typed."""
    yield from context.command_path.split()
    for param in context.command.params:
        source = context.get_parameter_source(param.name or "")
        if param.name in NOT_REPEATED or source is None or source.name != "COMMANDLINE":
            continue
        typed: Any = context.params[str(param.name)]
        name = [param.opts[-1]] if param.param_type_name == "option" else []
        for value in typed if isinstance(typed, list | tuple) else [typed]:
            yield from (*name, str(value))
