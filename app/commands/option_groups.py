"""Options that belong together: the fields of a dataclass, in which a command finds their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any

import typer

Command = Callable[..., None]


def among(*words: str) -> Callable[[str], list[str]]:
    """Shell completion of an option's value; the service checks the value."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def option(
    text: str,
    *names: str,
    values: tuple[str, ...] = (),
    least: float | None = None,
    metavar: str | None = None,
    panel: str | None = None,
) -> Any:
    """An option without a default: the service has its own. `values` are offered by the shell."""
    return typer.Option(
        *names,
        help=text,
        show_default=False,
        autocompletion=among(*values) if values else None,
        min=least,
        metavar=metavar,
        rich_help_panel=panel,
    )


def without_none(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def takes_groups(command: Command) -> Command:
    """Replace each parameter whose type is a dataclass by one option per field, where it stands."""
    own = parameters_of(command)
    groups: dict[str, type] = {}
    for each in own:
        if isinstance(each.annotation, type) and is_dataclass(each.annotation):
            groups[each.name] = each.annotation
    fields = {
        name: [field.replace(kind=Parameter.KEYWORD_ONLY) for field in parameters_of(kind)]
        for name, kind in groups.items()
    }

    @wraps(command)
    def expanded(*arguments: object, **named: Any) -> None:
        for name, kind in groups.items():
            named[name] = kind(**{field.name: named.pop(field.name) for field in fields[name]})
        command(*arguments, **named)

    shown = [option for each in own for option in fields.get(each.name, [each])]
    del expanded.__wrapped__  # typer would read the parameters of the command itself
    expanded.__signature__ = Signature(shown)  # type: ignore[attr-defined]  # inspect reads it
    expanded.__annotations__ = {each.name: each.annotation for each in shown}
    return expanded


def parameters_of(function: Callable[..., object]) -> list[Parameter]:
    return list(signature(function, eval_str=True).parameters.values())
