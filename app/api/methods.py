"""Which methods a path takes: what `Allow` names, and HEAD wherever GET is."""

from __future__ import annotations

from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
FILE_METHODS = frozenset({"GET", "HEAD"})  # of a folder of files: the mount itself takes whatever comes
LOGIN = "/login"  # sent with GET, but opening a session and using up the link: HEAD must not


class HeadDone(Exception):
    """The head of the answer is sent, and nobody waits for the rest."""


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
                raise HeadDone  # a stream of events would go on for ever, a file would be read in vain

        asked = {**scope, "method": "GET"}  # a copy: the web server must see HEAD
        try:
            await self._app(asked, receive, send_head)
        except HeadDone:
            pass
        finally:
            scope["route"] = asked.get("route")


def stands_in(scope: Scope) -> bool:
    """True if GET answers for HEAD on this path."""
    taken = taken_methods(scope)
    return "GET" in taken and "HEAD" not in taken and scope["path"] != LOGIN


def allowed_methods(scope: Scope) -> list[str]:
    """What the path of a request takes, for the header `Allow`."""
    taken = taken_methods(scope)
    if "GET" in taken and scope["path"] != LOGIN:
        taken |= {"HEAD"}
    return sorted(taken)


def taken_methods(scope: Scope) -> set[str]:
    """The methods of all routes with the path: the framework names those of the first one only."""
    # A mount that the request has reached already counts its own prefix as the root.
    whole = {**scope, "root_path": scope.get("app_root_path", scope.get("root_path", ""))}
    taken: set[str] = set()
    for route in scope["app"].router.routes:
        for method in FILE_METHODS if isinstance(route, Mount) else METHODS:
            if route.matches({**whole, "method": method})[0] is Match.FULL:
                taken.add(method)
    return taken
