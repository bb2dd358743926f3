"""The connections, stores and caches of one API process."""

from __future__ import annotations

import asyncio

from redis import Redis

from app.api.callers import Callers
from app.api.gateway import Gateway
from app.api.metrics import Metrics
from app.api.model_cards import ModelCards
from app.api.routing import RoutingTable
from app.core.access.api_keys import KeyStore
from app.core.access.audit_log import AuditLog
from app.core.access.authentication import Authenticator
from app.core.access.hub_tokens import HubTokens
from app.core.access.idempotency import IdempotencyKeys
from app.core.access.limits import TenantLimits
from app.core.access.links import LinkSigner
from app.core.access.login import LoginLinks
from app.core.changes.change_listener import ChangeListener
from app.core.changes.stamps import StampReader
from app.core.deployments.deployment_store import DeploymentStore
from app.core.jobs.job_queue import JobQueue
from app.core.jobs.job_store import JobStore
from app.core.jobs.outcome import Outcome
from app.core.jobs.turns import Turns
from app.core.jobs.worker_registry import WorkerRegistry
from app.core.outgoing.webhook_messages import DeliveryStore, WebhookSecrets
from app.core.pushes.push_store import PushStore
from app.core.settings import Settings
from app.core.storage.artifact_store import ArtifactStore
from app.core.storage.dataset_store import DatasetStore
from app.core.storage.object_store import ObjectStore
from app.core.storage.reuse import ReuseIndex
from app.core.storage.tags import Tags
from app.core.telemetry.tally import Tally
from app.core.upkeep.garbage import GarbageCollector


class Services:
    """Built once, on the event loop, and shared by all requests."""

    def __init__(self, settings: Settings, redis: Redis, redis_url: str, metrics: Metrics) -> None:
        self.settings = settings
        self.redis = redis
        self.metrics = metrics
        self.objects = ObjectStore(settings.object_store_url)
        # Access and limits.
        self.keys = KeyStore(redis)
        self.logins = LoginLinks(redis)
        self.limits = TenantLimits(redis, settings)
        self.idempotency = IdempotencyKeys(redis)
        self.links = LinkSigner(redis)
        self.audit = AuditLog(redis)
        # Deployments and inference.
        self.deployments = DeploymentStore(redis)
        self.routes = RoutingTable(redis, self.deployments)
        self.gateway = Gateway(self.routes, self.deployments, settings, metrics)
        # Jobs and their results.
        self.jobs = JobStore(redis)
        self.queue = JobQueue(redis, limit=settings.queue_limit)
        self.turns = Turns(self.jobs, self.queue, lambda tenant: self.limits.of(tenant).running_jobs)
        self.artifacts = ArtifactStore(self.objects)
        self.cards = ModelCards(self.artifacts)
        self.reuse = ReuseIndex(redis, self.objects)
        self.datasets = DatasetStore(self.objects)
        self.tags = Tags(redis)
        self.pushes = PushStore(redis)
        self.hub_tokens = HubTokens(redis, settings)
        parts = (self.jobs, self.queue, self.turns, self.objects, self.deployments, self.reuse, self.limits)
        self.outcome = Outcome(*parts, self.pushes, self.hub_tokens)
        self.garbage = GarbageCollector(self.jobs, self.objects, self.limits, self.tags, settings)
        self.deliveries = DeliveryStore(redis)
        self.webhook_secrets = WebhookSecrets(redis)
        self.workers = WorkerRegistry(redis)
        self.tally = Tally(redis)
        # Notifications of changes.
        self.changes = ChangeListener(redis, asyncio.get_running_loop())
        self.stamps = StampReader(redis_url)
        self.callers = Callers(
            Authenticator(redis, self.keys, self.limits),
            self.limits,
            self.stamps,
            lambda: self.routes.is_offline,
        )
