"""Performs effects: one class blocks, the other awaits. Otherwise the two clients are the same.

`returns` and `yields` turn flows and streams into methods that block or await with the class of the client.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, overload

import httpx

from app.client import effects
from app.client.effects import Call, Emit, Flow, ItemT, ResultT, Stream, emitted
from app.client.paths import is_loopback

CHUNK_BYTES = 1 << 20  # of a file that is sent
FAULTS = (httpx.TransportError, OSError)  # thrown into the flow, which decides what to do


def options(url: str, api_key: str | None) -> dict[str, Any]:
    """The options of both kinds of httpx clients."""
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
        "timeout": httpx.Timeout(30.0, connect=5.0),
        # A proxy from the environment must not see the key of a service on this machine.
        "trust_env": not is_loopback(url),
    }


def request_of(http: httpx.Client | httpx.AsyncClient, call: Call) -> httpx.Request:
    timeout = http.timeout
    if call.read_timeout_s is not None:
        timeout = httpx.Timeout(timeout.connect, read=call.read_timeout_s)
    headers, content = {**call.headers}, call.content
    body: Any = content
    if isinstance(content, Path):
        headers["Content-Length"] = str(content.stat().st_size)
        body = read_awaited(content) if isinstance(http, httpx.AsyncClient) else read_blocking(content)
    return http.build_request(
        call.method,
        call.route,
        params=call.params,
        json=call.json,
        content=body,
        headers=headers,
        timeout=timeout,
    )


def read_blocking(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


async def read_awaited(path: Path) -> AsyncIterator[bytes]:
    with await asyncio.to_thread(path.open, "rb") as file:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk


class Connection:
    """Runs flows on an httpx.Client."""

    http: httpx.Client

    def run(self, flow: Flow[ResultT]) -> ResultT:
        with closing(self.stream(emitted(flow))) as results:
            return next(results)

    def stream(self, flow: Stream[ItemT]) -> Generator[ItemT, None, None]:
        passage = Passage(self.http)
        outcome: Any = None
        try:
            while True:
                effect = flow.throw(outcome) if isinstance(outcome, FAULTS) else flow.send(outcome)
                outcome = None
                if isinstance(effect, Emit):
                    yield effect.item
                    continue
                try:
                    outcome = passage.perform(effect)
                except FAULTS as fault:
                    outcome = fault
        except StopIteration:
            return
        finally:
            flow.close()
            passage.close()


class Passage:
    """Performs the effects of one flow; holds its open answer."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._answer: httpx.Response | None = None
        self._chunks: Iterator[bytes] = iter(())

    def perform(self, effect: effects.Effect) -> Any:
        match effect:
            case effects.Send(call):
                return self._http.send(request_of(self._http, call))
            case effects.Open(call, chunk_bytes):
                self.close()
                # Files may be redirected to storage; httpx does not send the key to another host.
                self._answer = self._http.send(
                    request_of(self._http, call), stream=True, follow_redirects=True
                )
                self._chunks = self._answer.iter_bytes(chunk_bytes)
                return self._answer
            case effects.Read():
                return next(self._chunks, None)
            case effects.ReadAll():
                assert self._answer is not None
                return self._answer.read()
            case effects.Pause(seconds):
                time.sleep(seconds)
                return None
            case effects.RunTask(task):
                return task()

    def close(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None


class AsyncConnection:
    """Runs flows on an httpx.AsyncClient."""

    http: httpx.AsyncClient

    async def run(self, flow: Flow[ResultT]) -> ResultT:
        async with aclosing(self.stream(emitted(flow))) as results:
            return await anext(results)

    async def stream(self, flow: Stream[ItemT]) -> AsyncGenerator[ItemT, None]:
        passage = AsyncPassage(self.http)
        outcome: Any = None
        try:
            while True:
                effect = flow.throw(outcome) if isinstance(outcome, FAULTS) else flow.send(outcome)
                outcome = None
                if isinstance(effect, Emit):
                    yield effect.item
                    continue
                try:
                    outcome = await passage.perform(effect)
                except FAULTS as fault:
                    outcome = fault
        except StopIteration:
            return
        finally:
            flow.close()
            await passage.close()


class AsyncPassage:
    """Performs the effects of one flow; holds its open answer."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._answer: httpx.Response | None = None
        self._chunks: AsyncIterator[bytes] | None = None

    async def perform(self, effect: effects.Effect) -> Any:
        match effect:
            case effects.Send(call):
                return await self._http.send(request_of(self._http, call))
            case effects.Open(call, chunk_bytes):
                await self.close()
                self._answer = await self._http.send(
                    request_of(self._http, call), stream=True, follow_redirects=True
                )
                self._chunks = self._answer.aiter_bytes(chunk_bytes)
                return self._answer
            case effects.Read():
                assert self._chunks is not None
                return await anext(self._chunks, None)
            case effects.ReadAll():
                assert self._answer is not None
                return await self._answer.aread()
            case effects.Pause(seconds):
                return await asyncio.sleep(seconds)
            case effects.RunTask(task):
                return await asyncio.to_thread(task)

    async def close(self) -> None:
        if self._answer is not None:
            await self._answer.aclose()
            self._answer = None


P = ParamSpec("P")


class returns(Generic[P, ResultT]):  # a decorator
    """Turns a flow into a method that returns its result, or an awaitable on an AsyncConnection.

    Accessed on the class it is the flow itself, for use in other flows.
    """

    def __init__(self, flow: Callable[Concatenate[Any, P], Flow[ResultT]]) -> None:
        self._flow = flow

    @overload
    def __get__(self, client: None, owner: type) -> Callable[Concatenate[Any, P], Flow[ResultT]]: ...
    @overload
    def __get__(self, client: Connection, owner: type) -> Callable[P, ResultT]: ...
    @overload
    def __get__(self, client: AsyncConnection, owner: type) -> Callable[P, Coroutine[Any, Any, ResultT]]: ...
    def __get__(self, client: Connection | AsyncConnection | None, owner: type) -> Callable[..., Any]:
        if client is None:
            return self._flow
        return lambda *arguments, **named: client.run(self._flow(client, *arguments, **named))


class yields(Generic[P, ItemT]):  # a decorator
    """Turns a stream into a method that returns an iterator, asynchronous on an AsyncConnection."""

    def __init__(self, stream: Callable[Concatenate[Any, P], Stream[ItemT]]) -> None:
        self._stream = stream

    @overload
    def __get__(self, client: None, owner: type) -> Callable[Concatenate[Any, P], Stream[ItemT]]: ...
    @overload
    def __get__(self, client: Connection, owner: type) -> Callable[P, Generator[ItemT, None, None]]: ...
    @overload
    def __get__(self, client: AsyncConnection, owner: type) -> Callable[P, AsyncGenerator[ItemT, None]]: ...
    def __get__(self, client: Connection | AsyncConnection | None, owner: type) -> Callable[..., Any]:
        if client is None:
            return self._stream
        return lambda *arguments, **named: client.stream(self._stream(client, *arguments, **named))
