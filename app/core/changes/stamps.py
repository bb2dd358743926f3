"""Stamps: small values in Redis, each of which changes whenever the records it stands for do.

A job's stamp is its `version`. An answer computed after its stamps were read stays valid while they are
unchanged. They are times of Redis, not counters, so that a Redis that has lost its contents never repeats an
old value.
"""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.core.changes.atomic_changes import Script
from app.core.changes.redis_keys import JOB_PREFIX

KEPT_S = 3600  # far longer than any answer is cached, so an expired stamp also counts as a change
LIMIT_S = 1.0  # then the route reads by itself, with a longer limit

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
    """Reads stamps for many requests at once: those that arrive during a round trip share the next one.

    Every value is read after it was requested. One reader per event loop.
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
