"""Stamps: small values in Redis, each of which changes with every change of what it stands for.

A job's stamp is its `version`.
What was computed after its stamps were read stays true for as long as they are the same. They are times of
Redis, not counters, so that a Redis that has lost its contents does not come to an old value again.
"""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.core.records.job_keys import JOB_PREFIX

KEPT_S = 3600  # far longer than any answer is kept, so that its absence is a change, too
LIMIT_S = 1.0  # then the route asks, with more patience

# A function of scripts: give a stamp a new value.
STAMP = f"""
local function stamp(key)
  local now = redis.call('TIME')
  redis.call('SET', key, now[1] .. '-' .. now[2], 'EX', {KEPT_S})
end
"""

READ = f"""
local found = {{}}
for i, key in ipairs(KEYS) do
  if string.sub(key, 1, {len(JOB_PREFIX)}) == '{JOB_PREFIX}' then
    found[i] = redis.call('HGET', key, 'version')
  else
    found[i] = redis.call('GET', key)
  end
end
return found
"""

Values = tuple[bytes | None, ...]


class StampReader:
    """Reads for many requests in one round trip: what is asked for while one is under way goes with the next.

    Each answer was read after it was asked for. One per event loop.
    """

    def __init__(self, url: str) -> None:
        self._redis: AsyncRedis = AsyncRedis.from_url(
            url, socket_timeout=LIMIT_S, socket_connect_timeout=LIMIT_S, retry=Retry(NoBackoff(), 1)
        )
        self._script: Any = self._redis.register_script(READ)
        self._asked: list[tuple[tuple[str, ...], asyncio.Future[Values]]] = []
        self._task: asyncio.Task[None] | None = None

    async def read(self, names: tuple[str, ...]) -> Values:
        """The present values. Raises RedisError."""
        answer: asyncio.Future[Values] = asyncio.get_running_loop().create_future()
        self._asked.append((names, answer))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return await answer

    async def _run(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, []
            names = list({name: None for wanted, _ in asked for name in wanted})
            fault = RedisError("the read was given up")
            found: dict[str, bytes | None] | None = None
            try:
                found = dict(zip(names, await self._script(keys=names), strict=True))
            except RedisError as met:
                fault = met
            finally:
                for wanted, answer in asked:
                    if answer.done():  # its caller has left
                        continue
                    if found is None:
                        answer.set_exception(fault)
                    else:
                        answer.set_result(tuple(found[name] for name in wanted))

    async def close(self) -> None:
        if self._task is not None:
            await asyncio.wait({self._task})
        await self._redis.aclose()
