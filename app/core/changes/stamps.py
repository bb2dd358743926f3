"""Stamps: small values in Redis, each of which changes with every change of what it stands for.

A job's stamp is its `version`.
What was computed after its stamps were read stays true for as long as they are the same. They are times of
Redis, not counters, so that a Redis that has lost its contents does not come to an old value again.
"""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.core.changes.atomic_changes import Script
from app.core.changes.redis_keys import JOB_PREFIX

KEPT_S = 3600  # far longer than any answer is kept, so that its absence is a change, too
LIMIT_S = 1.0  # then the route asks, with more patience

# A function of scripts: give a stamp a new value.
STAMP = f"""
local function stamp(key)
  local now = redis.call('TIME')
  redis.call('SET', key, now[1] .. '-' .. now[2], 'EX', {KEPT_S})
end
"""

READ = Script(
    more_keys="stamps",
    body=f"""
local values = {{}}
for i, key in ipairs(stamps) do
  if string.sub(key, 1, {len(JOB_PREFIX)}) == '{JOB_PREFIX}' then
    values[i] = redis.call('HGET', key, 'version')
  else
    values[i] = redis.call('GET', key)
  end
end
return values
""",
)

Values = tuple[bytes | None, ...]


class StampReader:
    """Reads for many requests in one round trip: what is asked for while one is under way goes with the next.

    Each answer was read after it was asked for. One per event loop.
    """

    def __init__(self, url: str) -> None:
        self._redis: AsyncRedis = AsyncRedis.from_url(
            url, socket_timeout=LIMIT_S, socket_connect_timeout=LIMIT_S, retry=Retry(NoBackoff(), 1)
        )
        self._script = READ.on(self._redis)
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
            distinct = list({name: None for names, _ in asked for name in names})
            fault = RedisError("the read was given up")
            values: dict[str, bytes | None] | None = None
            try:
                values = dict(zip(distinct, await self._script(stamps=distinct), strict=True))
            except RedisError as failure:
                fault = failure
            finally:
                for names, answer in asked:
                    if answer.done():  # its caller has left
                        continue
                    if values is None:
                        answer.set_exception(fault)
                    else:
                        answer.set_result(tuple(values[name] for name in names))

    async def close(self) -> None:
        if self._task is not None:
            await asyncio.wait({self._task})
        await self._redis.aclose()
