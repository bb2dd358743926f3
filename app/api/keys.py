"""`/v1/keys`: API keys. A tenant's admin manages the tenant's keys, the operator those of all tenants."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from app.api.dependencies import Admin, ServicesParam
from app.api.preconditions import IdempotencyKey
from app.core.access.api_keys import ApiKey, Principal, Scope, TenantName, key_id, new_key
from app.core.errors import Forbidden
from app.core.records.specs import Frozen

router = APIRouter(prefix="/v1/keys", tags=["keys"])


class KeyRequest(Frozen):
    """The body of `POST /v1/keys`."""

    tenant: TenantName | None = Field(default=None, description="Default: the caller's tenant.")
    scopes: tuple[Scope, ...] = Field(min_length=1, max_length=32)
    name: str = Field(default="", max_length=64, pattern=r"^[^\x00-\x1f\x7f]*$")
    expires_in_s: int | None = Field(default=None, ge=60, le=10 * 365 * 24 * 3600)


class KeyView(BaseModel):
    object: Literal["key"] = "key"
    id: str
    tenant: str
    name: str
    scopes: list[Scope]
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    expired: bool

    @classmethod
    def of(cls, key: ApiKey) -> Self:
        return cls(
            id=key.id,
            tenant=key.tenant,
            name=key.name,
            scopes=sorted(key.scopes),
            created_at=key.created_at,
            expires_at=key.expires_at,
            last_used_at=key.last_used_at,
            expired=key.has_expired,
        )


class NewKeyView(KeyView):
    key: str = Field(default="", description="The key. It is shown only once.")


class KeyList(BaseModel):
    object: Literal["list"] = "list"
    data: tuple[KeyView, ...]
    has_more: bool = False
    next: str | None = None


def reachable_tenant(principal: Principal, tenant: str | None) -> str | None:
    """The tenant whose keys are meant; None means all. Only the operator may name another tenant."""
    if principal.allows(Scope.OPERATOR):
        return tenant
    if tenant not in (None, principal.tenant):
        raise Forbidden(
            f"only the operator manages keys of the tenant {tenant}",
            code="tenant_forbidden",
            remedy="use a key with the scope operator",
        )
    return principal.tenant


@router.post("", status_code=201)
def create_key(
    body: KeyRequest, services: ServicesParam, principal: Admin, idempotency_key: IdempotencyKey = None
) -> NewKeyView:
    """Create a key. Only this answer ever shows it.

    Repeating the request with its Idempotency-Key creates no second key: 409 names the existing one.
    """
    if Scope.OPERATOR in body.scopes:
        principal.require(Scope.OPERATOR)
    reachable_tenant(principal, body.tenant)
    lasts = body.expires_in_s
    request = f"key {body.model_dump_json()}"
    key = new_key(services.idempotency.claim(principal.tenant, idempotency_key, request, key_id(new_key())))
    record = services.keys.register(
        key,
        tenant=body.tenant or principal.tenant,
        scopes=frozenset(body.scopes),
        name=body.name,
        expires_at=datetime.now(UTC) + timedelta(seconds=lasts) if lasts is not None else None,
    )
    return NewKeyView.of(record).model_copy(update={"key": key})


@router.get("")
def list_keys(
    services: ServicesParam, principal: Admin, tenant: Annotated[TenantName | None, Query()] = None
) -> KeyList:
    """Keys without their secrets, oldest first: the tenant's, for the operator those of all tenants."""
    keys = services.keys.list(reachable_tenant(principal, tenant))
    return KeyList(data=tuple(KeyView.of(key) for key in keys))


@router.delete("/{key_id}", status_code=204)
def revoke_key(key_id: str, services: ServicesParam, principal: Admin) -> None:
    """Revoke a key and end its sessions."""
    services.keys.revoke(key_id, tenant=reachable_tenant(principal, None))
    services.idempotency.spend(key_id)
