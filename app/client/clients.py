"""The two clients: one blocking, one asynchronous."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import httpx

from app.client.connection import AsyncConnection, Connection, options
from app.client.exchange import Exchange
from app.client.retries import Retries
from app.client.service_calls import Operations


class NibbleClient(Operations, Connection):
    """One connection to a service. Use it as a context manager."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        retries: Retries | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.http = httpx.Client(**options(self.url, api_key), transport=transport)
        self.exchange = Exchange(self.url, retries or Retries())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()


class AsyncNibbleClient(Operations, AsyncConnection):
    """One asynchronous connection to a service. Use it as an asynchronous context manager."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        retries: Retries | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.http = httpx.AsyncClient(**options(self.url, api_key), transport=transport)
        self.exchange = Exchange(self.url, retries or Retries())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.http.aclose()
