"""`/v1/estimates`: predicts a job without running it."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.dependencies import JobsReader, ServicesParam
from app.api.services import Services
from app.core.jobs.estimate import Estimate, estimate
from app.core.jobs.submission import check_submission, require_memory
from app.core.planning.device_profile import DeviceKind, DeviceProfile
from app.core.planning.serving_devices import device_called
from app.core.records.job_body import JobSubmission
from app.core.records.specs import JobSpec

router = APIRouter(prefix="/v1/estimates", tags=["jobs"])


@router.post("")
def estimate_job(body: JobSubmission, services: ServicesParam, principal: JobsReader) -> Estimate:
    """Time, memory, disk and every linear's width, for the job body that POST /v1/jobs takes."""
    spec = for_serving_workers(body.spec, services)
    checked = check_submission(
        spec, services.settings.acting_with(body.hub_token).acting_for(principal.tenant)
    )
    require_memory(checked, services.workers)
    device, profile = best_device(services)
    return estimate(checked, device, profile)


def for_serving_workers(spec: JobSpec, services: Services) -> JobSpec:
    """With the device of the inference workers, if they all have the same and the body names none."""
    workers = [worker for worker in services.workers.living() if worker.queue == "serve"]
    devices = {device_called(worker.device_name) for worker in workers}
    if spec.serve_on is not None or len(devices) != 1:
        return spec
    return spec.model_copy(update={"serve_on": devices.pop()})


def best_device(services: Services) -> tuple[DeviceKind, DeviceProfile | None]:
    """The best device of the live workers, with its measured speed if there is one."""
    living = services.workers.living()
    gpus = [worker for worker in living if worker.device.startswith("cuda")]
    profiles = [worker.profile for worker in gpus or living if worker.profile is not None]
    fastest = max(profiles, key=lambda profile: max(profile.matmul.values()), default=None)
    return "cuda" if gpus else "cpu", fastest
