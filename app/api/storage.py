"""`/v1/storage`: what a tenant stores; `/v1/gc`: collection of what nothing refers to, for the operator."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from fastapi import APIRouter, Query
from pydantic import BaseModel

from app.api.dependencies import Admin, Operator, ServicesParam
from app.api.services import Services
from app.core.upkeep.garbage import Garbage

router = APIRouter(prefix="/v1", tags=["storage"])


class Stored(BaseModel):
    count: int
    bytes: int

    @classmethod
    def of(cls, sizes: dict[str, int], kind: str) -> Self:
        """Those whose ids begin with `kind`."""
        chosen = [size for name, size in sizes.items() if name.startswith(f"{kind}_")]
        return cls(count=len(chosen), bytes=sum(chosen))


class StorageView(BaseModel):
    object: Literal["storage"] = "storage"
    tenant: str
    artifacts: Stored
    datasets: Stored
    is_complete: bool  # False until a collection of garbage has counted what was there before


class GarbageView(BaseModel):
    object: Literal["garbage"] = "garbage"
    dry_run: bool
    checkpoints: tuple[str, ...]
    artifacts: tuple[str, ...]
    jobs: tuple[str, ...]
    datasets: tuple[str, ...]  # uploads that were interrupted
    bytes: int | None  # of the folders, with `dry_run`

    @classmethod
    def of(cls, garbage: Garbage, *, dry_run: bool, size: int | None = None) -> Self:
        return cls(dry_run=dry_run, bytes=size, **garbage.model_dump())


@router.get("/storage")
def read_storage(services: ServicesParam, principal: Admin) -> StorageView:
    """What the caller's tenant stores: artifacts and datasets, with their sizes."""
    sizes = services.limits.stored(principal.tenant)
    return StorageView(
        tenant=principal.tenant,
        artifacts=Stored.of(sizes, "art"),
        datasets=Stored.of(sizes, "ds"),
        is_complete=services.limits.artifacts(principal.tenant) is not None,
    )


@router.post("/gc")
def collect_garbage(
    services: ServicesParam, principal: Operator, dry_run: Annotated[bool, Query()] = False
) -> GarbageView:
    """Remove unreferenced objects and expired records; with `dry_run` only list them."""
    garbage = services.garbage.collect(dry_run=dry_run)
    size = folder_bytes(services, garbage) if dry_run else None
    return GarbageView.of(garbage, dry_run=dry_run, size=size)


def folder_bytes(services: Services, garbage: Garbage) -> int:
    folders = (*garbage.checkpoints, *garbage.artifacts, *garbage.datasets)
    return sum(head.size for folder in folders for head in services.objects.list(folder))
