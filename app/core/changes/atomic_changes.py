"""Changes that happen in one step: scripts that Redis runs, and compare-and-set on a record's version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from app.core.errors import Conflict

MAX_COLLISIONS = 50

# A function of scripts: the time of Redis in seconds. Hosts' clocks may differ.
NOW = """
local function now()
  local time = redis.call('TIME')
  return time[1] + time[2] / 1000000
end
"""

Record = TypeVar("Record")


class Script:
    """A Lua script with named keys and arguments: local variables in Lua, keywords in Python.

    `more_keys` names a table of any number of further keys, a sequence in Python.
    """

    def __init__(
        self, body: str, *, keys: tuple[str, ...] = (), more_keys: str = "", args: tuple[str, ...] = ()
    ) -> None:
        self.body = body
        self.keys, self.more_keys, self.args = keys, more_keys, args
        self.names = {*keys, *args, *filter(None, [more_keys])}
        lines = [f"local {name} = KEYS[{index}]" for index, name in enumerate(keys, 1)]
        lines += [f"local {name} = ARGV[{index}]" for index, name in enumerate(args, 1)]
        if more_keys:
            rest = f"{{}} for i = {len(keys) + 1}, #KEYS do {more_keys}[i - {len(keys)}] = KEYS[i] end"
            lines.append(f"local {more_keys} = {rest if keys else 'KEYS'}")
        self.text = "\n".join([*lines, body])

    def on(self, redis: Any) -> Callable[..., Any]:
        """The script bound to `redis` as a function with keywords; awaitable if the client is asynchronous.

        None becomes '' in Lua. Raises TypeError for missing or unknown names.
        """
        run = redis.register_script(self.text)

        def call(**values: Any) -> Any:
            if values.keys() != self.names:
                raise TypeError(
                    f"the script takes {sorted(self.names)}; missing {sorted(self.names - values.keys())}, "
                    f"unknown {sorted(values.keys() - self.names)}"
                )
            args = [values[name] for name in self.args]
            return run(
                keys=[*[values[name] for name in self.keys], *values.get(self.more_keys, ())],
                args=["" if value is None else value for value in args],
            )

        return call


def versioned_update(
    name: str,
    read: Callable[[], tuple[Record, int]],
    change: Callable[[Record], Record],
    swap: Callable[[Record, Record, int], bool],
) -> Record:
    """Apply `change` to a record and return the new one; repeated if another writer was faster.

    `swap(before, after, version)` writes unless the version has changed. An unchanged record is not written.
    `name` stands for the record in messages. Raises Conflict after MAX_COLLISIONS tries.
    """
    for _ in range(MAX_COLLISIONS):
        before, version = read()
        after = change(before)
        if after == before or swap(before, after, version):
            return after
    raise Conflict(
        f"{name} was changed {MAX_COLLISIONS} times while it was to be written",
        code="contended",
        remedy="try again",
    )
