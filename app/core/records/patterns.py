"""Checks regular expressions from callers, so that none can keep a process busy for ever.

Python's matcher backtracks and holds the interpreter while it does: `(a+)+x` on a name of forty characters
would halt every request of the process for years. So no repetition within a repetition, no choice within one,
and few repetitions in all.
"""

from __future__ import annotations

import re
import warnings

MAX_REPETITIONS = 3
TOKEN = re.compile(
    r"(?P<escape>\\.)"
    r"|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])"
    r"|(?P<special>\(\?(?!:))"
    r"|(?P<open>\((?:\?:)?)"
    r"|(?P<close>\))"
    r"|(?P<choice>\|)"
    r"|(?P<repeat>[*+]|\{\d*,?\d*\})"
    r"|(?P<other>.)",
    re.DOTALL,
)


def check_pattern(pattern: str) -> None:
    """Raises ValueError for a pattern that is malformed or could take very long to match."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sets that later Pythons may read otherwise
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as fault:
        raise ValueError(f"{pattern!r} is not a regular expression: {fault}") from fault
    repetitions = 0
    groups = [False]  # for each open group: does it hold a repetition or a choice?
    closed = False  # what the group holds that was closed just now
    for token in TOKEN.finditer(pattern):
        kind = token.lastgroup
        if kind == "special" or (kind == "escape" and token[0][1].isdigit()):
            raise ValueError(f"{pattern!r}: look-arounds, flags and back-references are not allowed")
        if kind == "repeat":
            repetitions += 1
            if closed or repetitions > MAX_REPETITIONS:
                raise ValueError(
                    f"{pattern!r} could take very long to match: use at most {MAX_REPETITIONS} repetitions, "
                    "and none of a group that repeats or chooses"
                )
        groups, closed = after_token(kind or "", groups)


def after_token(kind: str, groups: list[bool]) -> tuple[list[bool], bool]:
    """The open groups behind a token, and what a group that it closes holds."""
    if kind == "open":
        return [*groups, False], False
    if kind == "close":
        *outer, inner = groups
        outer = outer or [False]
        return [*outer[:-1], outer[-1] or inner], inner
    return [*groups[:-1], groups[-1] or kind in ("repeat", "choice")], False
