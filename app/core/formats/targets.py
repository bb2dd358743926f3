"""Module names in the config files of formats: names that servers look up, and compact patterns.

Servers make one matrix of linears that read one input and ask for its scheme by a name that no checkpoint
has: vLLM 0.33 from the names of the parts where the model's class lists them, SGLang 0.5.23 for fewer
classes still. So an entry names the whole beside its parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Numbers = tuple[str, ...]
MARK = "#"  # in place of a number in a module's name
ANYWHERE = r"(.*\.)?"  # the beginning of a pattern

# Of a linear: the matrices that it becomes a part of. The last two are vLLM's and SGLang's name for one.
FUSED_NAMES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
    **dict.fromkeys(("gate_proj", "up_proj"), ("gate_up_proj",)),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa")),
    **dict.fromkeys(("in_proj_qkv", "in_proj_z"), ("in_proj_qkvz",)),
    **dict.fromkeys(("in_proj_b", "in_proj_a"), ("in_proj_ba",)),
    **dict.fromkeys(("w1", "w3"), ("w13",)),
}
# SGLang 0.5.23 looks up the scheme of experts by these names, whatever the checkpoint calls them.
EXPERT_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def fused_names(name: str) -> tuple[str, ...]:
    """The names of the matrices into which servers fuse the linear; none for experts."""
    parent, _, leaf = name.rpartition(".")
    if expert_set(name) is not None:
        return ()
    return tuple(f"{parent}.{fused}" for fused in FUSED_NAMES.get(leaf, ()))


def expert_set(name: str) -> str | None:
    """The module of all experts of a layer, if the linear is one of theirs."""
    expert = re.fullmatch(r"(.+\.experts)\.\d+\..+", name)
    return None if expert is None else expert[1]


def fused_by_name(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The sets of linears that servers fuse, as far as their names say it; all experts of a layer are one."""
    together: dict[object, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        key = expert_set(name) or (parent, FUSED_NAMES.get(leaf, leaf))
        together.setdefault(key, []).append(name)
    return [tuple(each) for each in together.values() if len(each) > 1]


def expert_names(name: str) -> tuple[str, ...]:
    """The name by which servers look up an expert's linear, where the checkpoint has another."""
    parent, _, leaf = name.rpartition(".")
    if expert_set(name) is None or leaf not in EXPERT_NAMES:
        return ()
    return (f"{parent}.{EXPERT_NAMES[leaf]}",)


def mixer_names(name: str) -> tuple[str, ...]:
    """The name by which vLLM 0.32's class of granitemoehybrid looks up a linear of `mamba`."""
    return (name.replace(".mamba.", ".mixer."),) if ".mamba." in name else ()


def compact_patterns(chosen: Sequence[str], names: Iterable[str]) -> list[str]:
    """Patterns that match the `chosen` of `names` and no others.

    Names that differ in their numbers or their last part share a pattern: all layers' `mlp.gate_proj` and
    `mlp.up_proj` are one. Where the numbers follow no such rule, each name is a pattern of its own. What
    comes before the layers may be anything, as servers put them into other modules than the checkpoint.
    """
    every = list(names)
    existing, grouped = by_stem(every), by_stem(chosen)
    alike: dict[tuple[str, frozenset[Numbers], frozenset[Numbers]], list[str]] = {}
    for (stem, leaf), numbered in grouped.items():
        alike.setdefault((stem, frozenset(numbered), frozenset(existing[stem, leaf])), []).append(leaf)
    patterns = []
    for (stem, _, possible), leaves in alike.items():
        members = [name for leaf in leaves for name in grouped[stem, leaf].values()]
        patterns += next(
            (
                [pattern]
                for beginning, text in ((ANYWHERE, from_layers(stem)), ("", stem))
                if (middle := numbered_pattern(text, list(grouped[stem, leaves[0]]), possible)) is not None
                and (pattern := f"^{beginning}{middle}{choice([re.escape(leaf) for leaf in leaves])}$")
                and matched([pattern], every) == set(members)
            ),
            [exact(name) for name in members],
        )
    assert matched(patterns, every) == set(chosen)
    return patterns


def from_layers(stem: str) -> str:
    """The stem without what comes before the list of layers."""
    before, mark, rest = stem.partition(MARK)
    return before[before.rstrip(".").rfind(".") + 1 :] + mark + rest if mark else stem


def matched(patterns: Sequence[str], names: Iterable[str]) -> set[str]:
    """The names that loaders find by `patterns`: they call `re.match`."""
    return {name for name in names if any(re.match(pattern, name) for pattern in patterns)}


def by_stem(names: Iterable[str]) -> dict[tuple[str, str], dict[Numbers, str]]:
    """The names by stem, with a mark for each number, and last segment."""
    groups: dict[tuple[str, str], dict[Numbers, str]] = {}
    for name in names:
        *before, leaf = name.split(".")
        stem = "".join((MARK if segment.isdecimal() else segment) + "." for segment in before)
        numbers = tuple(segment for segment in before if segment.isdecimal())
        groups.setdefault((stem, leaf), {})[numbers] = name
    return groups


def numbered_pattern(stem: str, numbers: list[Numbers], possible: frozenset[Numbers]) -> str | None:
    """One pattern for a stem: any number, or a choice of numbers, at each position.

    None if `numbers` are not all combinations of such choices.
    """
    chosen = set(numbers)
    choices = [list(dict.fromkeys(column)) for column in zip(*numbers, strict=True)]
    everywhere = [set(column) for column in zip(*possible, strict=True)]
    if any(
        all(number in some for number, some in zip(each, choices, strict=True)) and each not in chosen
        for each in possible
    ):
        return None
    pattern, *rest = [re.escape(text) for text in stem.split(MARK)]
    for some, existing, text in zip(choices, everywhere, rest, strict=True):
        pattern += (r"\d+" if set(some) == existing else choice(some)) + text
    return pattern


def choice(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else "(" + "|".join(parts) + ")"


def exact(name: str) -> str:
    return f"^{re.escape(name)}$"
