"""Browser login: a one-time link, then a cookie that scripts can't read."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, RedirectResponse, Response
from pydantic import BaseModel

from app.api.callers import SESSION_COOKIE, session_of
from app.api.dashboard import PAGE_HEADERS
from app.api.dependencies import Anyone, ServicesParam
from app.core.access.api_keys import Scope
from app.core.access.login import LINK_S, SESSION_S
from app.core.errors import Unauthenticated
from app.core.telemetry.version import package_version
from app.dashboard import LINK_REFUSED

router = APIRouter(tags=["sessions"])


class Caller(BaseModel):
    """Who asks, by its key, and of which service."""

    object: Literal["caller"] = "caller"
    key: str  # the id of the API key, also for a browser's session
    tenant: str
    scopes: tuple[Scope, ...]  # with those that follow from them
    version: str  # of the service


@router.get("/v1/whoami")
def read_caller(principal: Anyone) -> Caller:
    """The caller's key, tenant and scopes, and the version of the service."""
    return Caller(
        key=principal.key_id,
        tenant=principal.tenant,
        scopes=tuple(scope for scope in Scope if principal.allows(scope)),
        version=package_version(),
    )


class LoginLink(BaseModel):
    object: Literal["login_link"] = "login_link"
    path: str
    expires_at: datetime


@router.post("/v1/login-links", status_code=201)
def create_login_link(services: ServicesParam, principal: Anyone) -> LoginLink:
    """A link that opens one session with the rights of the calling key."""
    code = services.logins.new_code(principal.key_id)
    return LoginLink(path=f"/login?code={code}", expires_at=datetime.now(UTC) + timedelta(seconds=LINK_S))


@router.get(
    "/login",
    response_class=Response,
    status_code=303,
    responses={401: {"description": "Already used, or too old."}},
)
def log_in(
    request: Request, services: ServicesParam, code: Annotated[str, Query(max_length=128)]
) -> Response:
    """Open a session and go to the dashboard. A browser with a session goes there with an old link, too."""
    key_id, is_first = services.logins.use(code)
    if key_id is not None:
        request.state.principal = services.keys.holder(key_id)  # for the audit log and the logs
    if key_id is None or not is_first:
        return refused_link(request, is_signed_in=services.logins.has_session(session_of(request.scope)))
    answer = RedirectResponse("/", 303, headers={"Cache-Control": "no-store"})
    answer.set_cookie(
        SESSION_COOKIE,
        services.logins.open_session(key_id),
        max_age=SESSION_S,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return answer


def refused_link(request: Request, *, is_signed_in: bool) -> Response:
    """To the dashboard with a session, a page for other browsers. Raises Unauthenticated for programs."""
    if "text/html" in request.headers.get("accept", ""):
        if is_signed_in:
            return RedirectResponse("/", 303, headers={"Cache-Control": "no-store"})
        headers = {**PAGE_HEADERS, "Cache-Control": "no-store"}
        return FileResponse(LINK_REFUSED, 401, headers=headers, media_type="text/html")
    raise Unauthenticated(
        "this login link was used already, or is older than ten minutes",
        code="login_link_invalid",
        remedy="create a new one with `nibble login`",
    )


@router.post("/v1/logout", status_code=204)
def log_out(request: Request, services: ServicesParam, principal: Anyone) -> Response:
    """End the session of the cookie, if there is one."""
    session = session_of(request.scope)
    if session is not None:
        services.logins.close_session(session)
    answer = Response(status_code=204)
    answer.delete_cookie(SESSION_COOKIE, httponly=True, samesite="strict")
    return answer
