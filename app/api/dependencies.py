"""What routes are given: the service's connections, and who calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from redis import Redis

from app.api.gateway import Gateway
from app.api.key_cache import KeyCache
from app.api.metrics import Metrics
from app.api.routing import RoutingTable
from app.core.access.api_keys import KeyStore, Principal, Scope
from app.core.access.audit_log import AuditLog
from app.core.access.idempotency import IdempotencyKeys
from app.core.access.limits import TenantLimits
from app.core.access.links import LinkSigner
from app.core.access.login import LoginLinks
from app.core.changes.change_listener import ChangeListener
from app.core.changes.stamps import StampReader
from app.core.deployments.deployment_store import DeploymentStore
from app.core.errors import Forbidden, Unauthenticated
from app.core.jobs.job_queue import JobQueue
from app.core.jobs.job_store import JobStore
from app.core.jobs.outcome import Outcome
from app.core.jobs.turns import Turns
from app.core.jobs.worker_registry import WorkerRegistry
from app.core.outgoing.webhook_messages import DeliveryStore, WebhookSecrets
from app.core.settings import Settings
from app.core.storage.artifact_store import ArtifactStore
from app.core.storage.object_store import ObjectStore
from app.core.storage.reuse import ReuseIndex
from app.core.telemetry.tally import Tally
from app.core.upkeep.garbage import GarbageCollector


@dataclass(frozen=True)
class Services:
    """Made once by the lifespan, shared by all requests."""

    settings: Settings
    redis: Redis
    jobs: JobStore
    queue: JobQueue
    idempotency: IdempotencyKeys
    objects: ObjectStore
    artifacts: ArtifactStore
    keys: KeyStore
    limits: TenantLimits
    audit: AuditLog
    garbage: GarbageCollector
    reuse: ReuseIndex
    logins: LoginLinks
    deliveries: DeliveryStore
    webhook_secrets: WebhookSecrets
    workers: WorkerRegistry
    changes: ChangeListener
    deployments: DeploymentStore
    routes: RoutingTable
    callers: KeyCache
    gateway: Gateway
    links: LinkSigner
    tally: Tally
    stamps: StampReader
    turns: Turns
    outcome: Outcome
    metrics: Metrics


def services_of(request: Request) -> Services:
    return cast("Services", request.app.state.services)


ServicesParam = Annotated[Services, Depends(services_of)]
SESSION_COOKIE = "nibble_session"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
bearer = HTTPBearer(auto_error=False, description="An API key: nib_<id>_<secret>")


Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


def authenticated(request: Request, services: ServicesParam, credentials: Credentials) -> Principal:
    """Who calls. Counts the request against the tenant's rate."""
    principal = identified(request, services, credentials)
    request.state.principal = principal  # for the audit log and the logs
    services.limits.count_request(principal.tenant)
    return principal


def identified(
    request: Request, services: Services, credentials: HTTPAuthorizationCredentials | None
) -> Principal:
    """Who calls, by the API key in the header, else by the cookie of a browser's session."""
    if credentials is not None:
        return services.keys.authenticate(credentials.credentials)
    session = request.cookies.get(SESSION_COOKIE)
    if session is None:
        raise Unauthenticated(
            "the request carries no API key",
            code="api_key_missing",
            remedy="send `Authorization: Bearer <key>`",
        )
    # A browser sends the cookie by itself, and names the origin with every change.
    if request.method not in SAFE_METHODS and "origin" not in request.headers:
        raise Forbidden(
            "a change with a session's cookie must name its origin",
            code="origin_missing",
            remedy="send the header Origin, or use an API key",
        )
    return services.keys.holder(services.logins.key_id_of(session))


def holder_of(scope: Scope) -> Callable[[Principal], Principal]:
    """The dependency that admits keys with `scope` only."""

    def check(principal: Annotated[Principal, Depends(authenticated)]) -> Principal:
        principal.require(scope)
        return principal

    return check


Caller = Annotated[Principal, Depends(authenticated)]
Operator = Annotated[Principal, Depends(holder_of(Scope.OPERATOR))]
Admin = Annotated[Principal, Depends(holder_of(Scope.ADMIN))]
JobsReader = Annotated[Principal, Depends(holder_of(Scope.JOBS_READ))]
JobsWriter = Annotated[Principal, Depends(holder_of(Scope.JOBS_WRITE))]
ArtifactsReader = Annotated[Principal, Depends(holder_of(Scope.ARTIFACTS_READ))]
ArtifactsWriter = Annotated[Principal, Depends(holder_of(Scope.ARTIFACTS_WRITE))]
DeploymentsReader = Annotated[Principal, Depends(holder_of(Scope.DEPLOYMENTS_READ))]
DeploymentsWriter = Annotated[Principal, Depends(holder_of(Scope.DEPLOYMENTS_WRITE))]
