"""Refuses foreign web pages: every request's Host and every change's Origin must be the service's own.

A page in a user's browser can send requests to services that only this user reaches, also under a name of its
own that resolves to this service (DNS rebinding). Such a page can't send API keys but does send cookies; the
check covers both. The operator may admit pages of other origins (NIBBLE_CORS_ORIGINS): they call with API
keys and read the answers, and a session's cookie is of no use to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.callers import SAFE_METHODS, key_of
from app.api.errors import error_response
from app.core.errors import Forbidden


class OriginGuard:
    """Answers 403 to requests with a foreign Host, and to changes from a foreign Origin.

    Pages of `origins` may change something with an API key.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None, origins: Sequence[str] = ()) -> None:
        self._app = app
        self._hosts = hosts
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is not None:
            await error_response(scope["path"], refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Forbidden | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts is not None and host_name(host) not in self._hosts:
            return Forbidden(
                f"this service is not called {host[:200]!r}",
                code="host_forbidden",
                remedy="let the operator add the name to NIBBLE_ALLOWED_HOSTS",
            )
        origin = headers.get("origin")
        if origin is None or scope["method"] in SAFE_METHODS or network_location(origin) == host.lower():
            return None
        if self._origins & {"*", origin.lower()} and key_of(scope) is not None:
            return None
        return Forbidden(
            f"a page of {origin[:200]!r} may not change anything here",
            code="origin_forbidden",
            remedy="call from the service's own pages, with an API key from a page whose origin the operator "
            "lists in NIBBLE_CORS_ORIGINS, or from a program without the header Origin",
        )


def host_name(host: str) -> str:
    """The host name in a Host header, without port and brackets; empty if malformed."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def network_location(origin: str) -> str:
    """Host and port of an origin; empty for `null` and malformed values."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
