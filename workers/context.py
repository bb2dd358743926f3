"""What the attempts of one worker share."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from app.core.deployment_store import DeploymentStore
from app.core.device_profile import DeviceProfile
from app.core.job_child import CHILD_MODULE
from app.core.job_queue import JobQueue
from app.core.job_store import JobStore
from app.core.limits import TenantLimits
from app.core.object_store import ObjectStore
from app.core.reuse import ReuseIndex
from app.core.settings import Settings
from app.core.tally import Tally
from app.core.tracing import Tracer
from app.core.turns import Turns


@dataclass(frozen=True)
class WorkerContext:
    """What a worker's attempts share."""

    settings: Settings
    store: JobStore
    queue: JobQueue
    objects: ObjectStore
    deployments: DeploymentStore
    name: str
    device: str
    shutdown: threading.Event
    reuse: ReuseIndex
    limits: TenantLimits
    tally: Tally
    tracer: Tracer
    profile: DeviceProfile | None = None
    child_module: str = CHILD_MODULE

    @property
    def turns(self) -> Turns:
        return Turns(self.store, self.queue, lambda tenant: self.limits.of(tenant).running_jobs)
