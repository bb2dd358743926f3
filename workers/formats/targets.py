"""Names of modules as few regular expressions, for the config files of mixed-precision formats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Numbers = tuple[str, ...]
MARK = "#"  # in place of a number in a module's name


def compact_patterns(wanted: Sequence[str], names: Iterable[str]) -> list[str]:
    """Anchored patterns that match the `wanted` among `names` and nothing else of them.

    Names that differ in their numbers alone share a pattern: all layers' `mlp.down_proj` is one. Where the
    numbers follow no such rule, each name is a pattern of its own.
    """
    every = list(names)
    templates: dict[str, set[Numbers]] = {}
    for name in every:
        templates.setdefault(template(name), set()).add(numbers(name))
    groups: dict[str, list[str]] = {}
    for name in wanted:
        groups.setdefault(template(name), []).append(name)
    patterns = []
    for shape, members in groups.items():
        pattern = numbered_pattern(shape, [numbers(name) for name in members], templates[shape])
        proven = pattern is not None and matched([pattern], every) == set(members)
        patterns += [pattern] if pattern is not None and proven else [exact(name) for name in members]
    assert matched(patterns, every) == set(wanted)
    return patterns


def matched(patterns: Sequence[str], names: Iterable[str]) -> set[str]:
    """The names that loaders find by `patterns`: they call `re.match`."""
    return {name for name in names if any(re.match(pattern, name) for pattern in patterns)}


def numbered_pattern(shape: str, found: list[Numbers], possible: set[Numbers]) -> str | None:
    """One pattern for a template: any number, or a choice of numbers, in each place.

    None if the numbers that are meant are not all combinations of such choices.
    """
    chosen = set(found)
    choices = [list(dict.fromkeys(place)) for place in zip(*found, strict=True)]
    everywhere = [set(place) for place in zip(*possible, strict=True)]
    if any(
        all(number in choice for number, choice in zip(each, choices, strict=True)) and each not in chosen
        for each in possible
    ):
        return None
    parts = [re.escape(part) for part in shape.split(MARK)]
    pattern = parts[0]
    for choice, existing, part in zip(choices, everywhere, parts[1:], strict=True):
        some = choice[0] if len(choice) == 1 else "(" + "|".join(choice) + ")"
        number = r"\d+" if set(choice) == existing else some
        pattern += number + part
    return f"^{pattern}$"


def exact(name: str) -> str:
    return f"^{re.escape(name)}$"


def template(name: str) -> str:
    return ".".join(MARK if part.isdecimal() else part for part in name.split("."))


def numbers(name: str) -> Numbers:
    return tuple(part for part in name.split(".") if part.isdecimal())
