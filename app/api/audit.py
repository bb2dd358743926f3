"""`/v1/audit`, and the middleware that writes its entries."""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, BeforeValidator, Field
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.callers import SAFE_METHODS
from app.api.dependencies import Admin, ServicesParam
from app.api.events import checked_event_id
from app.api.methods import LOGIN
from app.api.paging import PageQuery
from app.api.services import Services
from app.core.access.api_keys import Principal
from app.core.access.audit_log import AuditEntry, AuditFilter
from app.core.records.forms import written_time

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/audit", tags=["audit"])

# POST routes that change nothing.
QUESTIONS = frozenset({"/v1/estimates", "/v1/recommendations", "/v1/chat/completions", "/v1/completions"})


class AuditList(BaseModel):
    object: Literal["list"] = "list"
    data: tuple[AuditEntry, ...]
    has_more: bool
    next: str | None


class AuditQuery(PageQuery):
    """Of `GET /v1/audit`."""

    key: str = Field(default="", max_length=64, description="The id of a key.")
    q: str = Field(
        default="",
        max_length=200,
        description="Words that all occur in method, path, detail and the request's id.",
    )
    since: Annotated[datetime, BeforeValidator(written_time)] | None = Field(
        default=None, description="The earliest time; without a zone it is UTC."
    )
    refused: bool = Field(default=False, description="Only what was answered with 4xx or 5xx.")
    limit: int = Field(default=100, ge=1, le=1000)

    @property
    def chosen(self) -> AuditFilter:
        words = tuple(self.q.lower().split())
        return AuditFilter(key=self.key, words=words, since=self.since, is_refused=self.refused)


@router.get("")
def list_audit(services: ServicesParam, principal: Admin, query: Annotated[AuditQuery, Query()]) -> AuditList:
    """The tenant's changes and logins, newest first, each with its key and status."""
    limit, before = query.limit, checked_event_id(query.after)
    entries = services.audit.page(principal.tenant, limit=limit + 1, before=before, chosen=query.chosen)
    data = tuple(entries[:limit])
    has_more = len(entries) > limit
    return AuditList(data=data, has_more=has_more, next=data[-1].id if has_more else None)


class AuditTrail:
    """Writes an audit entry before it sends the answer to a change."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_question(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return

        async def send_recorded(message: Message) -> None:
            if message["type"] == "http.response.start":
                await record(scope, message["status"])
            await send(message)

        await self._app(scope, receive, send_recorded)


def is_question(method: str, path: str) -> bool:
    return path in QUESTIONS or (method in SAFE_METHODS and path != LOGIN)


async def record(scope: Scope, status: int) -> None:
    principal: Principal | None = scope["state"].get("principal")
    if principal is None:  # without a tenant nobody could read the entry; the access log has the request
        return
    services: Services = scope["app"].state.services
    entry: dict[str, str | int] = {
        "key_id": principal.key_id,
        "request_id": scope["state"].get("request_id", ""),
        "method": scope["method"],
        "path": scope["path"][:500],
        "status": status,
    }
    if detail := scope["state"].get("audit_detail", ""):
        entry["detail"] = detail[:2000]
    try:
        await run_in_threadpool(services.audit.append, principal.tenant, entry)
    except RedisError:
        log.exception("not in the audit log: %s", entry)
