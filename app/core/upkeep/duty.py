"""Duties: repeated work that one of several API processes does for all of them.

Who has a duty keeps it with each pass. If it is lost, another one takes the duty when the claim has expired.
Nothing depends on there being one: every step of the work may be done twice.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from redis import Redis

from app.core.changes.atomic_changes import Script
from app.core.changes.redis_keys import duty_key

LASTS = 1.5  # intervals between two passes

HOLD = Script(
    keys=("duty",),
    args=("holder", "milliseconds"),
    body="""
local present = redis.call('GET', duty)
if present and present ~= holder then return 0 end
redis.call('SET', duty, holder, 'PX', milliseconds)
return 1
""",
)

LEAVE = Script(
    keys=("duty",),
    args=("holder",),
    body="""
if redis.call('GET', duty) == holder then return redis.call('DEL', duty) end
return 0
""",
)


class Duty:
    """This process's claim to do `name` every `interval_s` seconds."""

    def __init__(self, redis: Redis, name: str, interval_s: float) -> None:
        client: Any = redis  # Any: redis-py types each answer as possibly awaitable
        self._hold, self._leave = HOLD.on(client), LEAVE.on(client)
        self._key = duty_key(name)
        self._holder = secrets.token_hex(8)
        self._milliseconds = int(LASTS * interval_s * 1000)

    def doing(self, work: Callable[[], object]) -> Callable[[], None]:
        """`work`, done by the process that has the duty."""

        def turn() -> None:
            if self._hold(duty=self._key, holder=self._holder, milliseconds=self._milliseconds):
                work()

        return turn

    def leave(self) -> None:
        """Let another process have it at once."""
        self._leave(duty=self._key, holder=self._holder)
