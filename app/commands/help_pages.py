"""Help of the commands: plain text at any width, grouped options, examples; and a command group that imports
a command only when it is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from app.commands.examples import EXAMPLES
from app.commands.option_groups import Command, takes_groups
from app.core.errors import field_fault

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
# How typer writes the type of a value, and what stands there for people.
TYPE = re.compile(r" <([^<>]*)>(?:\.\.\.)?$")
VALUE_WORDS = {
    "int": "N", "int range": "N", "float": "X", "float range": "X", "str": "TEXT", "list[str]": "TEXT",
    "path": "PATH", "file": "FILE", "directory": "FOLDER",
}  # fmt: skip
OWN_OPTIONS = "Options"
CommandT = TypeVar("CommandT", bound=Command)


class Entry(NamedTuple):
    """Where a command is defined, `module:name` below app.commands, and what it does in one line."""

    where: str
    summary: str


class PlainFaults:
    """A wrong value of an option is refused in the words of the API's fields."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            rest: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]
        except typer.BadParameter as fault:
            from pydantic import ValidationError

            if isinstance(fault.__cause__, ValidationError):
                fault.message = field_fault(fault.__cause__.errors()[0])
            raise
        return rest


class HelpfulCommand(PlainFaults, TyperCommand):
    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [word.strip("{}") for word in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        write_options(self, ctx, formatter)
        write_examples(ctx, formatter)


class HelpfulGroup(PlainFaults, TyperGroup):
    def format_options(self, ctx: Any, formatter: Any) -> None:
        write_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)
        write_examples(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, first_line(one.help)) for name, one in self.commands.items()])


class CommandsOnUse(MutableMapping[str, Any]):
    """Commands by name; each is imported when it is asked for."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries
        self.loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self.loaded:
            self.loaded[name] = load(name, self.entries[name])
        return self.loaded[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self.loaded[name] = command

    def __delitem__(self, name: str) -> None:
        raise TypeError("commands are not removed")

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def load(name: str, entry: Entry) -> Any:
    """The command or group of an entry."""
    module, _, attribute = entry.where.partition(":")
    loaded = getattr(import_module(f"app.commands.{module}"), attribute)
    if isinstance(loaded, CommandGroup):
        return typer.main.get_group(loaded.typer)
    single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    single.command(name, cls=HelpfulCommand)(takes_groups(loaded))
    return typer.main.get_command(single)


class CommandGroup:
    """Commands below a word, such as `nibble artifacts`, and what the word does alone."""

    def __init__(self, help_text: str, *, no_args_is_help: bool = False) -> None:
        self.typer = typer.Typer(
            help=help_text, no_args_is_help=no_args_is_help, cls=HelpfulGroup, rich_markup_mode=None,
            pretty_exceptions_enable=False,
        )  # fmt: skip

    def command(self, name: str | None = None) -> Callable[[CommandT], CommandT]:
        return registered(self.typer.command(name, cls=HelpfulCommand))

    def callback(self) -> Callable[[CommandT], CommandT]:
        return registered(self.typer.callback(invoke_without_command=True))


def registered(register: Callable[[Command], Command]) -> Callable[[CommandT], CommandT]:
    """Registers a command with the options of its groups, and leaves it as it is."""

    def decorate(command: CommandT) -> CommandT:
        register(takes_groups(command))
        return command

    return decorate


def write_options(command: Any, ctx: Any, formatter: Any) -> None:
    """The arguments, then the options by group, in the order in which they are declared."""
    arguments: list[tuple[str, str]] = []
    panels: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        if param.param_type_name == "argument":
            arguments.append((param.metavar or param.name.upper(), with_facts(param)))
        elif not param.hidden:
            panels.setdefault(param.rich_help_panel or OWN_OPTIONS, []).append(
                (option_names(param, ctx), with_facts(param))
            )
    own = panels.pop(OWN_OPTIONS, [])
    for heading, rows in (("Arguments", arguments), *panels.items(), (OWN_OPTIONS, own)):
        if rows:
            with formatter.section(heading):
                formatter.write_dl(rows)


def option_names(param: Any, ctx: Any) -> str:
    """`-o, --out PATH`."""
    record = param.get_help_record(ctx)
    names = record[0] if record is not None else ", ".join(param.opts)
    return TYPE.sub(lambda match: " " + VALUE_WORDS.get(match[1], match[1]), names)


def with_facts(param: Any) -> str:
    """The help, and what else is of use: the variable that sets it, its default, that it is needed."""
    facts = [f"[{param.envvar}]"] if param.envvar and isinstance(param.envvar, str) else []
    default = param.default
    if param.show_default is True and default not in (None, False, "", ()) and not callable(default):
        facts.append(f"[default: {param.opts[0] if default is True else getattr(default, 'value', default)}]")
    if param.required and param.param_type_name == "option":
        facts.append("[required]")
    return " ".join([param.help or "", *facts])


def write_examples(ctx: Any, formatter: Any) -> None:
    examples = EXAMPLES.get(ctx.command_path.partition(" ")[2], ())
    if examples:
        with formatter.section("Examples"):
            for line in examples:
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
