"""`/v1/tenants/{tenant}/limits`: a tenant's limits and use."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel

from app.api.dependencies import Admin, Operator, ServicesParam
from app.api.services import Services
from app.core.access.api_keys import Scope, TenantName
from app.core.access.limits import Limits
from app.core.errors import NotFound

router = APIRouter(prefix="/v1/tenants", tags=["tenants"])
Tenant = Annotated[TenantName, Path()]


class Usage(BaseModel):
    active_jobs: int
    running_jobs: int  # queued or running
    storage_bytes: int


class LimitsView(BaseModel):
    object: Literal["tenant_limits"] = "tenant_limits"
    tenant: str
    limits: Limits  # 0 is no limit
    usage: Usage

    @classmethod
    def of(cls, services: Services, tenant: str) -> LimitsView:
        usage = Usage(
            active_jobs=services.limits.active_jobs(tenant),
            running_jobs=services.jobs.turns_taken(tenant),
            storage_bytes=services.limits.stored_bytes(tenant),
        )
        return cls(tenant=tenant, limits=services.limits.of(tenant), usage=usage)


@router.get("/{tenant}/limits")
def read_limits(tenant: Tenant, services: ServicesParam, principal: Admin) -> LimitsView:
    """Limits and use of the caller's tenant; the operator may read any tenant's."""
    if tenant != principal.tenant and not principal.allows(Scope.OPERATOR):
        raise NotFound(
            f"there is no tenant {tenant}", code="tenant_not_found", remedy="name the tenant of your key"
        )
    return LimitsView.of(services, tenant)


@router.put("/{tenant}/limits")
def set_limits(body: Limits, tenant: Tenant, services: ServicesParam, principal: Operator) -> LimitsView:
    """Set one tenant's limits, overriding the settings."""
    services.limits.set(tenant, body)
    services.turns.give(tenant)
    return LimitsView.of(services, tenant)
