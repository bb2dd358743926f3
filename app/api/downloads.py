"""Links that read a single file without a key."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from app.api.artifacts import FILE_RESPONSES, ConditionsParam, sent_file
from app.api.dependencies import ArtifactsReader, ServicesParam
from app.core.records.specs import Frozen
from app.core.storage.artifact_store import file_key

router = APIRouter(prefix="/v1", tags=["artifacts"])


class LinkRequest(Frozen):
    """The body of `POST /v1/artifacts/{id}/links`."""

    path: str = Field(min_length=1, max_length=1024)
    expires_in_s: int = Field(default=3600, ge=1, le=7 * 24 * 3600)


class Signed(BaseModel):
    """The link's file, expiry and signature."""

    expires: int = Field(ge=0, le=2**40)
    signature: str = Field(pattern="^[0-9a-f]{64}$")


class LinkView(BaseModel):
    object: Literal["link"] = "link"
    url: str = Field(description="An absolute URL if the storage signs links, else a path of this service.")
    expires_at: datetime


@router.post("/artifacts/{artifact_id}/links", status_code=201)
def create_link(
    artifact_id: str, body: LinkRequest, services: ServicesParam, principal: ArtifactsReader
) -> LinkView:
    """A link that reads one file without a key until it expires."""
    manifest, file = services.artifacts.file(principal.tenant, artifact_id, body.path)
    lasts_s = body.expires_in_s
    url = (
        services.objects.presign(file_key(manifest, file.path), expires_s=lasts_s)
        if services.objects.can_presign
        else services.links.path(manifest.id, file.path, lasts_s=lasts_s)
    )
    return LinkView(url=url, expires_at=datetime.now(UTC) + timedelta(seconds=lasts_s))


@router.get("/downloads/{artifact_id}/{path:path}", response_class=Response, responses=FILE_RESPONSES)
def follow_link(
    artifact_id: str,
    path: str,
    services: ServicesParam,
    conditions: ConditionsParam,
    signed: Annotated[Signed, Query()],
) -> Response:
    """The linked file."""
    services.links.check(artifact_id, path, expires=signed.expires, signature=signed.signature)
    manifest, file = services.artifacts.linked_file(artifact_id, path)
    return sent_file(services, manifest, file, conditions)
