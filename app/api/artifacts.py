"""`/v1/artifacts`: published artifacts and their files."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Collection, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from pydantic import BaseModel, Field

from app.api.artifact_views import ArtifactList, ArtifactView, views_of
from app.api.dependencies import ArtifactsReader, ArtifactsWriter, ServicesParam
from app.api.errors import problem
from app.api.paging import PageQuery
from app.api.preconditions import (
    UNCHANGED,
    ByteRange,
    IfNoneMatch,
    UnsatisfiableRange,
    matches_tag,
    requested_range,
    tagged_answer,
)
from app.api.services import Services
from app.core.errors import Conflict, InvalidRequest, Unavailable
from app.core.records.artifact import ArtifactFile, ArtifactManifest
from app.core.storage.artifact_store import file_key
from app.core.storage.published import discard

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"])


FILE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}},
    206: {"description": "The requested range.", "content": {"application/octet-stream": {}}},
    304: {"description": "Not changed."},
    307: {"description": "Redirect to a temporary link in object storage."},
    416: {"description": "No byte of the file is in the range."},
}


class Conditions(BaseModel):
    """Request headers that select a range of a file or a cached answer."""

    range: str | None = None
    if_range: str | None = None
    if_none_match: str | None = None


ConditionsParam = Annotated[Conditions, Header()]


class ArtifactQuery(PageQuery):
    """Filters of the list."""

    tag: str | None = Field(default=None, description="Only artifacts with this tag, of any model.")


@router.get("", response_model=ArtifactList, responses=UNCHANGED)
def list_artifacts(
    services: ServicesParam,
    principal: ArtifactsReader,
    query: Annotated[ArtifactQuery, Query()],
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The tenant's artifacts, newest first."""
    tenant = principal.tenant
    only: Collection[str] | None = services.limits.artifacts(tenant)
    if query.tag is not None:
        tagged = {each for each, tags in services.tags.by_artifact(tenant).items() if query.tag in tags}
        only = tagged if only is None else tagged.intersection(only)
    page = services.artifacts.page(tenant, limit=query.limit, after=query.after, only=only)
    views = views_of(services, tenant, page.manifests)
    cursor = views[-1].id if page.has_more else None
    return tagged_answer(ArtifactList(data=views, has_more=page.has_more, next=cursor), if_none_match)


@router.get("/{artifact_id}", response_model=ArtifactView, responses=UNCHANGED)
def read_artifact(
    artifact_id: str,
    services: ServicesParam,
    principal: ArtifactsReader,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The manifest: the path, size and SHA-256 of every file."""
    manifest = services.artifacts.get(principal.tenant, artifact_id)
    return tagged_answer(views_of(services, principal.tenant, [manifest])[0], if_none_match)


@router.delete("/{artifact_id}", status_code=204)
def delete_artifact(
    artifact_id: str,
    request: Request,
    services: ServicesParam,
    principal: ArtifactsWriter,
    force: Annotated[bool, Query(description="Also if it has tags, which go with it.")] = False,
) -> None:
    """Remove an artifact and its files. Delete deployments that serve it first."""
    manifest = services.artifacts.get(principal.tenant, artifact_id)
    require_unused(services, manifest.id)
    if not force:
        require_untagged(services, manifest)
    discard(services.objects, services.limits, manifest)
    moves = services.tags.forget(manifest)
    request.state.audit_detail = "; ".join(move.text for move in moves)
    for push_id in services.pushes.forget(manifest.id):
        services.hub_tokens.forget(push_id)


def require_untagged(services: Services, manifest: ArtifactManifest) -> None:
    tags = sorted(services.tags.of(manifest))
    if tags:
        raise Conflict(
            f"artifact {manifest.id} has the tag {', '.join(tags)}",
            code="artifact_tagged",
            remedy="give the tag to another artifact, or take it away (PATCH, nibble tag), or delete with "
            "?force=true (nibble artifacts delete --force)",
        )


def require_unused(services: Services, artifact_id: str) -> None:
    users = [
        live.spec.name for live in services.deployments.all() if artifact_id in live.deployment.artifacts
    ]
    if users:
        raise Conflict(
            f"artifact {artifact_id} is served by the deployment {', '.join(users)}",
            code="artifact_in_use",
            remedy="delete the deployment first",
        )


@router.head("/{artifact_id}/files/{path:path}", include_in_schema=False)
def head_file(
    artifact_id: str,
    path: str,
    services: ServicesParam,
    principal: ArtifactsReader,
    conditions: ConditionsParam,
) -> Response:
    _, file = services.artifacts.file(principal.tenant, artifact_id, path)
    if matches_tag(conditions.if_none_match, etag_of(file)):
        return Response(status_code=304, headers=file_headers(file))
    headers = {**file_headers(file), "Content-Length": str(file.size)}
    return Response(headers=headers, media_type=media_type(file))


@router.get(
    "/{artifact_id}/files/{path:path}",
    response_class=Response,
    responses=FILE_RESPONSES,
)
def read_file(
    artifact_id: str,
    path: str,
    services: ServicesParam,
    principal: ArtifactsReader,
    conditions: ConditionsParam,
) -> Response:
    """A file, or a byte range of it."""
    manifest, file = services.artifacts.file(principal.tenant, artifact_id, path)
    return sent_file(services, manifest, file, conditions)


def sent_file(
    services: Services, manifest: ArtifactManifest, file: ArtifactFile, conditions: Conditions
) -> Response:
    if matches_tag(conditions.if_none_match, etag_of(file)):
        return Response(status_code=304, headers=file_headers(file))
    key = file_key(manifest, file.path)
    if services.objects.can_presign:
        return RedirectResponse(services.objects.presign(key), 307, headers={"Cache-Control": "no-store"})
    is_current = conditions.if_range is None or conditions.if_range == etag_of(file)
    try:
        byte_range = requested_range(conditions.range if is_current else None, file.size)
    except UnsatisfiableRange:
        return unsatisfiable(file)
    return file_answer(services, key, file, byte_range)


def file_answer(services: Services, key: str, file: ArtifactFile, byte_range: ByteRange | None) -> Response:
    # A range has no digest of its own, so the stored size is checked before any byte is sent.
    stored = services.objects.require(key).size
    if stored != file.size:
        raise corrupt(key, f"{stored} bytes", f"{file.size}")
    start, end = byte_range or ByteRange(0, file.size)
    headers = {**file_headers(file), "Content-Length": str(end - start)}
    if byte_range is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    chunks = services.objects.stream(key, start, end)
    return StreamingResponse(
        verified(chunks, key, file) if byte_range is None else chunks,
        status_code=200 if byte_range is None else 206,
        headers=headers,
        media_type=media_type(file),
    )


def verified(chunks: Iterator[bytes], key: str, file: ArtifactFile) -> Iterator[bytes]:
    """Stream a whole file; its last chunk is sent only if the SHA-256 matches the manifest.

    A damaged file thus ends in a broken connection instead of a complete but wrong answer.
    """
    digest, held = hashlib.sha256(), b""
    for chunk in chunks:
        digest.update(chunk)
        if held:
            yield held
        held = chunk
    if digest.hexdigest() != file.sha256:
        raise corrupt(key, f"SHA-256 {digest.hexdigest()}", file.sha256)
    yield held


def corrupt(key: str, stored: str, expected: str) -> Unavailable:
    return Unavailable(
        f"the stored object {key} has {stored}, its manifest says {expected}",
        code="storage_corrupt",
        remedy="restore the object, or delete the artifact and create it again with `force`",
    )


def unsatisfiable(file: ArtifactFile) -> Response:
    refusal = InvalidRequest(
        f"no byte of {file.path} is in the range; it has {file.size} bytes",
        code="range_not_satisfiable",
        remedy="ask for bytes below its size",
    )
    return problem(refusal, status=416, headers={"Content-Range": f"bytes */{file.size}"})


def etag_of(file: ArtifactFile) -> str:
    return f'"{file.sha256}"'


def file_headers(file: ArtifactFile) -> dict[str, str]:
    return {
        "ETag": etag_of(file),
        "Accept-Ranges": "bytes",
        # Files of an artifact never change.
        "Cache-Control": "private, max-age=31536000, immutable",
    }


def media_type(file: ArtifactFile) -> str:
    """The media type by suffix, never one that a browser executes."""
    guessed = mimetypes.guess_type(file.path)[0]
    return (
        guessed
        if guessed in ("application/json", "text/plain", "text/markdown")
        else "application/octet-stream"
    )
