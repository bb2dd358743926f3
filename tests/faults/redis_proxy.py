"""A proxy in front of a Redis socket that answers late, or not at all for a while."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PIECE = 1 << 16


class RedisProxy:
    """Passes bytes on. Until `slow_until` each piece waits `delay_s`, until `cut_until` none arrives."""

    def __init__(self, socket: Path, target: Path) -> None:
        self.socket, self._target = socket, target
        self.delay_s = 0.0
        self.slow_until = self.cut_until = 0.0
        self._loop = asyncio.new_event_loop()

    def slow_down(self, delay_s: float, seconds: float) -> None:
        self.delay_s, self.slow_until = delay_s, time.monotonic() + seconds

    def cut_off(self, seconds: float) -> None:
        """As a network that is split: connections stay, nothing comes through."""
        self.cut_until = time.monotonic() + seconds

    def heal(self) -> None:
        self.slow_until = self.cut_until = 0.0

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)

    async def _serve(self) -> None:
        self._ended = asyncio.Event()
        self._open: set[asyncio.Task[None]] = set()
        async with await asyncio.start_unix_server(self._pass_on, path=self.socket):
            await self._ended.wait()
            for task in [*self._open]:
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            await self._connect(reader, writer)
        finally:
            self._open.discard(task)
            writer.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            redis_reader, redis_writer = await asyncio.open_unix_connection(self._target)
        except OSError:
            return
        ways = [
            asyncio.ensure_future(self._pump(reader, redis_writer)),
            asyncio.ensure_future(self._pump(redis_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            redis_writer.close()

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(PIECE):
                if time.monotonic() < self.slow_until:
                    await asyncio.sleep(self.delay_s)
                while time.monotonic() < self.cut_until:
                    await asyncio.sleep(0.02)
                target.write(piece)
                await target.drain()


@contextmanager
def redis_proxy(socket: Path, target: Path) -> Iterator[RedisProxy]:
    proxy = RedisProxy(socket, target)
    thread = threading.Thread(target=proxy.run, name="redis proxy", daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.stop()
        thread.join()
