"""`/v1/jobs/{id}/events`: a job's history, as pages or as a stream."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header, Query
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from app.api.dependencies import JobsReader, ServicesParam
from app.api.schemas import EventList, EventView
from app.api.services import Services
from app.api.waiting import event_stream
from app.core.errors import MalformedRequest

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

EVENT_STREAM = "text/event-stream"
EVENT_ID = re.compile(r"\d{1,15}-\d{1,15}")


class EventQuery(BaseModel):
    after: str | None = Field(default=None, description="The id of the last event that the client received.")
    limit: int = Field(default=100, ge=1, le=1000)


class StreamHeaders(BaseModel):
    accept: str = "*/*"
    last_event_id: str | None = None


@router.get(
    "/{job_id}/events", response_model=EventList, responses={200: {"content": {EVENT_STREAM: {}}}, 204: {}}
)
async def read_events(
    job_id: str,
    services: ServicesParam,
    principal: JobsReader,
    query: Annotated[EventQuery, Query()],
    headers: Annotated[StreamHeaders, Header()],
) -> Response:
    """Events after `after`, oldest first; a stream if `Accept` names text/event-stream."""
    after = checked_event_id(query.after)
    start = checked_event_id(headers.last_event_id or None) or after
    job = await run_in_threadpool(services.jobs.get, principal.tenant, job_id)
    if EVENT_STREAM not in headers.accept:
        page = await run_in_threadpool(event_page, services, job_id, start, query.limit)
        return JSONResponse(page.model_dump(mode="json"))
    has_ended = job.is_terminal and not await run_in_threadpool(services.jobs.events, job_id, start, 1)
    if has_ended:
        # 204 stops an EventSource from reconnecting.
        return Response(status_code=204)
    stream = event_stream(services, principal.tenant, job_id, start)
    return StreamingResponse(
        stream, media_type=EVENT_STREAM, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    )


def event_page(services: Services, job_id: str, after: str | None, limit: int) -> EventList:
    events = services.jobs.events(job_id, after, limit + 1)
    data = tuple(EventView.of(event) for event in events[:limit])
    return EventList(data=data, has_more=len(events) > limit, next=data[-1].id if data else after)


def checked_event_id(event_id: str | None) -> str | None:
    if event_id is not None and EVENT_ID.fullmatch(event_id) is None:
        raise MalformedRequest(
            f"{event_id[:64]!r} is not an event id",
            code="invalid_cursor",
            remedy="pass the id of the last event that you received",
            param="after",
        )
    return event_id
