"""Carries out effects: one class blocks, the other awaits. Beyond this the clients are the same.

`returns` and `yields` make methods of flows and streams: what such a method gives depends on which of the two
classes it is called on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator
from contextlib import aclosing, closing
from typing import Any, Concatenate, Generic, ParamSpec, overload

import httpx

from app.client import effects
from app.client.effects import Call, Emit, Flow, ItemT, ResultT, Stream, emitted
from app.client.paths import is_loopback

FAULTS = (httpx.TransportError, OSError)  # a flow hears of these, and decides


def options(url: str, api_key: str | None) -> dict[str, Any]:
    """What both kinds of httpx clients are made with."""
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
    return http.build_request(
        call.method, call.route, params=call.params, json=call.json, headers=call.headers, timeout=timeout
    )


class Connection:
    """Carries flows out on an httpx.Client."""

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
    """The effects of one flow, with the answer that is open."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._answer: httpx.Response | None = None
        self._pieces: Iterator[bytes] = iter(())

    def perform(self, effect: effects.Effect) -> Any:
        match effect:
            case effects.Send(call):
                return self._http.send(request_of(self._http, call))
            case effects.Open(call, piece_bytes):
                self.close()
                # Files may lie in storage that a redirect leads to; httpx keeps the key from other hosts.
                self._answer = self._http.send(
                    request_of(self._http, call), stream=True, follow_redirects=True
                )
                self._pieces = self._answer.iter_bytes(piece_bytes)
                return self._answer
            case effects.Read():
                return next(self._pieces, None)
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
    """Carries flows out on an httpx.AsyncClient."""

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
    """The effects of one flow, with the answer that is open."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._answer: httpx.Response | None = None
        self._pieces: AsyncIterator[bytes] | None = None

    async def perform(self, effect: effects.Effect) -> Any:
        match effect:
            case effects.Send(call):
                return await self._http.send(request_of(self._http, call))
            case effects.Open(call, piece_bytes):
                await self.close()
                self._answer = await self._http.send(
                    request_of(self._http, call), stream=True, follow_redirects=True
                )
                self._pieces = self._answer.aiter_bytes(piece_bytes)
                return self._answer
            case effects.Read():
                assert self._pieces is not None
                return await anext(self._pieces, None)
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
    """Makes a flow a method: it returns the result, on an AsyncConnection an awaitable of it.

    On the class itself it is the flow, for flows that are made of others.
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
        return lambda *given, **named: client.run(self._flow(client, *given, **named))


class yields(Generic[P, ItemT]):  # a decorator
    """Makes a stream a method: it returns an iterator, on an AsyncConnection an asynchronous one."""

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
        return lambda *given, **named: client.stream(self._stream(client, *given, **named))
