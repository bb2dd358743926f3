"""Dependencies of routes: the services and the caller. All run on the event loop."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase

from app.api.callers import Callers
from app.api.services import Services
from app.core.access.api_keys import Principal, Scope


async def services_of(request: Request) -> Services:
    return cast("Services", request.app.state.services)


ServicesParam = Annotated[Services, Depends(services_of)]


class CallerWith(SecurityBase):
    """The dependency that admits callers with `scope`; all, for None. It counts the request."""

    def __init__(self, scope: Scope | None, *, outlasts_redis: bool = False) -> None:
        self.scheme_name = "HTTPBearer"  # in the description of the API
        self.model = HTTPBearer(description="An API key: nib_<id>_<secret>")
        self._scope = scope
        self._outlasts_redis = outlasts_redis

    async def __call__(self, request: Request) -> Principal:
        callers: Callers = request.app.state.services.callers
        principal = await callers.of(request.scope, outlasts_redis=self._outlasts_redis)
        if self._scope is not None:
            principal.require(self._scope)
        return principal


Anyone = Annotated[Principal, Depends(CallerWith(None))]
Operator = Annotated[Principal, Depends(CallerWith(Scope.OPERATOR))]
Admin = Annotated[Principal, Depends(CallerWith(Scope.ADMIN))]
JobsReader = Annotated[Principal, Depends(CallerWith(Scope.JOBS_READ))]
JobsWriter = Annotated[Principal, Depends(CallerWith(Scope.JOBS_WRITE))]
ArtifactsReader = Annotated[Principal, Depends(CallerWith(Scope.ARTIFACTS_READ))]
ArtifactsWriter = Annotated[Principal, Depends(CallerWith(Scope.ARTIFACTS_WRITE))]
DeploymentsReader = Annotated[Principal, Depends(CallerWith(Scope.DEPLOYMENTS_READ))]
DeploymentsWriter = Annotated[Principal, Depends(CallerWith(Scope.DEPLOYMENTS_WRITE))]
Inferrer = Annotated[Principal, Depends(CallerWith(Scope.INFERENCE, outlasts_redis=True))]
