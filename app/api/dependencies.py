"""What routes ask for: the service's connections, and who calls. None of it waits for a thread."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.api.services import Services
from app.core.access.api_keys import Principal, Scope

bearer = HTTPBearer(auto_error=False, description="An API key: nib_<id>_<secret>")


async def services_of(request: Request) -> Services:
    return cast("Services", request.app.state.services)


ServicesParam = Annotated[Services, Depends(services_of)]
# For the description of the API; `Callers` reads the header itself.
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


def caller_with(scope: Scope | None, *, outlasts_redis: bool = False) -> Callable[..., Awaitable[Principal]]:
    """The dependency that admits callers with `scope`; all, for None. It counts the request."""

    async def check(request: Request, services: ServicesParam, _: Credentials) -> Principal:
        principal = await services.callers.of(request.scope, outlasts_redis=outlasts_redis)
        if scope is not None:
            principal.require(scope)
        return principal

    return check


Anyone = Annotated[Principal, Depends(caller_with(None))]
Operator = Annotated[Principal, Depends(caller_with(Scope.OPERATOR))]
Admin = Annotated[Principal, Depends(caller_with(Scope.ADMIN))]
JobsReader = Annotated[Principal, Depends(caller_with(Scope.JOBS_READ))]
JobsWriter = Annotated[Principal, Depends(caller_with(Scope.JOBS_WRITE))]
ArtifactsReader = Annotated[Principal, Depends(caller_with(Scope.ARTIFACTS_READ))]
ArtifactsWriter = Annotated[Principal, Depends(caller_with(Scope.ARTIFACTS_WRITE))]
DeploymentsReader = Annotated[Principal, Depends(caller_with(Scope.DEPLOYMENTS_READ))]
DeploymentsWriter = Annotated[Principal, Depends(caller_with(Scope.DEPLOYMENTS_WRITE))]
Inferrer = Annotated[Principal, Depends(caller_with(Scope.INFERENCE, outlasts_redis=True))]
