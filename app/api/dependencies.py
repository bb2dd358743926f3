"""What routes are given: the service's connections, and who calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from redis import Redis

from app.api.metrics import Metrics
from app.core.artifact_store import ArtifactStore
from app.core.changes import ChangeListener
from app.core.errors import Unauthenticated
from app.core.idempotency import IdempotencyKeys
from app.core.job_queue import JobQueue
from app.core.job_store import JobStore
from app.core.object_store import ObjectStore
from app.core.security import KeyStore, Principal, Scope
from app.core.settings import Settings
from app.core.worker_registry import WorkerRegistry


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
    workers: WorkerRegistry
    changes: ChangeListener
    metrics: Metrics


def services_of(request: Request) -> Services:
    return cast("Services", request.app.state.services)


ServicesParam = Annotated[Services, Depends(services_of)]
bearer = HTTPBearer(auto_error=False, description="An API key: nib_<id>_<secret>")


def authenticated(
    services: ServicesParam, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> Principal:
    if credentials is None:
        raise Unauthenticated(
            "the request carries no API key",
            code="api_key_missing",
            remedy="send `Authorization: Bearer <key>`",
        )
    return services.keys.authenticate(credentials.credentials)


def holder_of(scope: Scope) -> Callable[[Principal], Principal]:
    """The dependency that admits keys with `scope` only."""

    def check(principal: Annotated[Principal, Depends(authenticated)]) -> Principal:
        principal.require(scope)
        return principal

    return check


JobsReader = Annotated[Principal, Depends(holder_of(Scope.JOBS_READ))]
JobsWriter = Annotated[Principal, Depends(holder_of(Scope.JOBS_WRITE))]
ArtifactsReader = Annotated[Principal, Depends(holder_of(Scope.ARTIFACTS_READ))]
ArtifactsWriter = Annotated[Principal, Depends(holder_of(Scope.ARTIFACTS_WRITE))]
