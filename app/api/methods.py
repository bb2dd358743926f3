"""The methods of a path: the `Allow` header, and HEAD wherever GET exists."""

from __future__ import annotations

from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
FILE_METHODS = frozenset({"GET", "HEAD"})  # methods of mounted static files: the mount accepts any
LOGIN = "/login"  # GET opens a session and uses up the link, so HEAD must not run it


class HeadDone(Exception):
    """Ends the handler once the head of the answer was sent."""


class HeadAsGet:
    """Answers HEAD as GET without the body, where a route has no HEAD of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD" or not stands_in(scope):
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                raise HeadDone  # do not run an endless event stream or read a file for nothing

        asked = {**scope, "method": "GET"}  # a copy: the web server must still see HEAD
        try:
            await self._app(asked, receive, send_head)
        except HeadDone:
            pass
        finally:
            scope["route"] = asked.get("route")


def stands_in(scope: Scope) -> bool:
    """Whether GET answers HEAD on this path."""
    taken = taken_methods(scope)
    return "GET" in taken and "HEAD" not in taken and scope["path"] != LOGIN


def allowed_methods(scope: Scope) -> list[str]:
    """The value of the header `Allow` for the request's path."""
    taken = taken_methods(scope)
    if "GET" in taken and scope["path"] != LOGIN:
        taken |= {"HEAD"}
    return sorted(taken)


def taken_methods(scope: Scope) -> set[str]:
    """The methods of all routes of the path; the framework names only the first route's."""
    # A mount that has already matched counts its prefix as root_path.
    whole = {**scope, "root_path": scope.get("app_root_path", scope.get("root_path", ""))}
    taken: set[str] = set()
    for route in scope["app"].router.routes:
        for method in FILE_METHODS if isinstance(route, Mount) else METHODS:
            if route.matches({**whole, "method": method})[0] is Match.FULL:
                taken.add(method)
    return taken
