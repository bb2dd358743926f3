"""Browser login: a one-time link, then a cookie that scripts can't read."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel

from app.api.callers import SESSION_COOKIE, session_of
from app.api.dependencies import Anyone, ServicesParam
from app.core.access.login import LINK_S, SESSION_S
from app.core.errors import Unauthenticated

router = APIRouter(tags=["sessions"])


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
    """Open a session and go to the dashboard."""
    key_id, is_first = services.logins.use(code)
    if key_id is not None:
        request.state.principal = services.keys.holder(key_id)  # for the audit log and the logs
    if key_id is None or not is_first:
        raise Unauthenticated(
            "this login link was used already, or is older than ten minutes",
            code="login_link_invalid",
            remedy="create a new one with `nibble login`",
        )
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


@router.post("/v1/logout", status_code=204)
def log_out(request: Request, services: ServicesParam, principal: Anyone) -> Response:
    """End the session of the cookie, if there is one."""
    session = session_of(request.scope)
    if session is not None:
        services.logins.close_session(session)
    answer = Response(status_code=204)
    answer.delete_cookie(SESSION_COOKIE, httponly=True, samesite="strict")
    return answer
