"""`/v1/gc`: garbage collection, for the operator."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from fastapi import APIRouter, Query
from pydantic import BaseModel

from app.api.dependencies import Operator, ServicesParam
from app.core.upkeep.garbage import Garbage

router = APIRouter(prefix="/v1/gc", tags=["storage"])


class GarbageView(BaseModel):
    object: Literal["garbage"] = "garbage"
    dry_run: bool
    checkpoints: tuple[str, ...]
    artifacts: tuple[str, ...]
    jobs: tuple[str, ...]
    datasets: tuple[str, ...]  # uploads that were interrupted

    @classmethod
    def of(cls, garbage: Garbage, *, dry_run: bool) -> Self:
        return cls(dry_run=dry_run, **garbage.model_dump())


@router.post("")
def collect_garbage(
    services: ServicesParam, principal: Operator, dry_run: Annotated[bool, Query()] = False
) -> GarbageView:
    """Remove unreferenced objects and expired records; with `dry_run` only list them."""
    return GarbageView.of(services.garbage.collect(dry_run=dry_run), dry_run=dry_run)
