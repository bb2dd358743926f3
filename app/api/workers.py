"""`/v1/workers`: the workers and their devices."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from app.api.dependencies import JobsReader, ServicesParam
from app.api.polled import polled
from app.api.preconditions import UNCHANGED, IfNoneMatch, tagged_answer
from app.api.schemas import WorkerList, WorkerView
from app.core.changes.redis_keys import WORKERS_STAMP

router = APIRouter(prefix="/v1/workers", tags=["workers"])


@router.get("", response_model=WorkerList, responses=UNCHANGED)
@polled(2.0, lambda tenant: (WORKERS_STAMP,))  # seconds after which a dead worker may have left the list
def list_workers(
    services: ServicesParam, principal: JobsReader, if_none_match: IfNoneMatch = None
) -> Response:
    """The workers with a recent heartbeat."""
    living = services.workers.living()
    page = WorkerList(data=tuple(WorkerView.of(worker, tenant=principal.tenant) for worker in living))
    return tagged_answer(page, if_none_match)
