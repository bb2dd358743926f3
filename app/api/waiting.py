"""Long polls and event streams of jobs; a waiting request holds no thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.concurrency import run_in_threadpool

from app.api.schemas import EventView
from app.api.services import Services
from app.core.errors import NotFound
from app.core.jobs.job_store import JobEvent
from app.core.records.job import Job

# A missed notification delays a change by at most this long. A stream waits no longer for the events after a
# job's end, which come late while storage is down.
RECHECK_S = 5.0
HEARTBEAT_S = 15.0
STREAM_STEP = 200

Until = Callable[[Job, int], bool]


async def wait_for_job(
    services: Services, tenant: str, job_id: str, *, wait_s: float, until: Until
) -> tuple[Job, int]:
    """Return the job and its version once `until(job, version)` is true, or after `wait_s` seconds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_s
    with services.changes.watch(job_id) as changed:
        while True:
            changed.clear()
            job, version = await run_in_threadpool(services.jobs.read_for, tenant, job_id)
            left = deadline - loop.time()
            if left <= 0 or until(job, version) or services.changes.is_closing:
                return job, version
            await wait_for_change(changed, min(left, RECHECK_S))


async def wait_for_change(changed: asyncio.Event, limit_s: float) -> bool:
    """Wait for the event; returns whether it was set within the limit."""
    try:
        async with asyncio.timeout(limit_s):
            await changed.wait()
    except TimeoutError:
        return False
    return True


async def event_stream(services: Services, tenant: str, job_id: str, after: str | None) -> AsyncIterator[str]:
    """Yield the job's events as server-sent events until the job has ended and all were sent."""
    yield "retry: 2000\n\n"
    idle_s, is_late = 0.0, False
    with services.changes.watch(job_id) as changed:
        while True:
            changed.clear()
            try:
                # Read the job before its events, so that a finished job's last event is among them.
                job = await run_in_threadpool(services.jobs.get, tenant, job_id)
                is_settled = job.is_terminal and await run_in_threadpool(services.jobs.is_settled, job_id)
            except NotFound:  # deleted while it was followed
                return
            events = await run_in_threadpool(services.jobs.events, job_id, after, STREAM_STEP)
            for event in events:
                yield server_sent(event)
                after = event.id
            if len(events) == STREAM_STEP:
                continue
            if is_settled or is_late or services.changes.is_closing:
                return
            idle_s = 0.0 if events else idle_s
            if not await wait_for_change(changed, RECHECK_S):
                idle_s += RECHECK_S
                is_late = job.is_terminal
            if idle_s >= HEARTBEAT_S:
                yield ": still here\n\n"
                idle_s = 0.0


def server_sent(event: JobEvent) -> str:
    return f"id: {event.id}\nevent: {event.kind}\ndata: {EventView.of(event).model_dump_json()}\n\n"
