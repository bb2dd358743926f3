"""`/v1/estimates`: what a job would take and do, without doing it."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.dependencies import JobsReader, Services, ServicesParam
from app.core.estimate import DeviceKind, Estimate, estimate
from app.core.specs import JobSpec
from app.core.submission import check_submission

router = APIRouter(prefix="/v1/estimates", tags=["jobs"])


@router.post("")
def estimate_job(spec: JobSpec, services: ServicesParam, principal: JobsReader) -> Estimate:
    """Time, memory, disk and every linear's width, for the job body that POST /v1/jobs takes."""
    checked = check_submission(spec, services.settings)
    return estimate(checked, device_kind(services))


def device_kind(services: Services) -> DeviceKind:
    """The best device that a living worker has."""
    has_gpu = any(worker.device.startswith("cuda") for worker in services.workers.living())
    return "cuda" if has_gpu else "cpu"
