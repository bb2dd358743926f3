"""Settings, stores and queues that the attempts of one worker share."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from app.core.access.hub_tokens import HubTokens
from app.core.access.limits import TenantLimits
from app.core.child.job_child import CHILD_MODULE
from app.core.deployments.deployment_store import DeploymentStore
from app.core.jobs.job_queue import JobQueue
from app.core.jobs.job_store import JobStore
from app.core.jobs.outcome import Outcome
from app.core.jobs.turns import Turns
from app.core.planning.device_profile import DeviceProfile
from app.core.pushes.push_store import PushStore
from app.core.settings import Settings
from app.core.storage.object_store import ObjectStore
from app.core.storage.reuse import ReuseIndex
from app.core.telemetry.tally import Tally
from app.core.telemetry.tracing import Tracer


@dataclass(frozen=True)
class WorkerContext:
    """Settings, stores and queues that a worker's attempts share."""

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
    pushes: PushStore
    hub_tokens: HubTokens
    tally: Tally
    tracer: Tracer
    profile: DeviceProfile | None = None
    child_module: str = CHILD_MODULE

    @property
    def turns(self) -> Turns:
        return Turns(self.store, self.queue, lambda tenant: self.limits.of(tenant).running_jobs)

    @property
    def outcome(self) -> Outcome:
        parts = (self.store, self.queue, self.turns, self.objects, self.deployments, self.reuse, self.limits)
        return Outcome(*parts, self.pushes, self.hub_tokens)
