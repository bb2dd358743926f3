"""`/v1/workers`: who executes jobs, and on what."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.dependencies import JobsReader, ServicesParam
from app.api.schemas import WorkerList, WorkerView

router = APIRouter(prefix="/v1/workers", tags=["workers"])


@router.get("")
def list_workers(services: ServicesParam, principal: JobsReader) -> WorkerList:
    """The workers whose heartbeat is fresh."""
    living = services.workers.living()
    return WorkerList(data=tuple(WorkerView.of(worker, tenant=principal.tenant) for worker in living))
