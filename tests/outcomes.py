"""What follows from a job's end, over real stores."""

from __future__ import annotations

from redis import Redis

from app.core.access.hub_tokens import HubTokens
from app.core.access.limits import TenantLimits
from app.core.deployments.deployment_store import DeploymentStore
from app.core.jobs.job_queue import JobQueue
from app.core.jobs.job_store import JobStore
from app.core.jobs.outcome import Outcome
from app.core.jobs.turns import Turns
from app.core.pushes.push_store import PushStore
from app.core.settings import Settings
from app.core.storage.object_store import ObjectStore
from app.core.storage.reuse import ReuseIndex


def outcome_over(redis: Redis, objects: ObjectStore, settings: Settings) -> Outcome:
    store, limits = JobStore(redis), TenantLimits(redis, settings)
    queue = JobQueue(redis, limit=settings.queue_limit)
    turns = Turns(store, queue, lambda tenant: limits.of(tenant).running_jobs)
    stores = (DeploymentStore(redis), ReuseIndex(redis, objects), limits)
    hub = (PushStore(redis), HubTokens(redis, settings))
    return Outcome(store, queue, turns, objects, *stores, *hub)
