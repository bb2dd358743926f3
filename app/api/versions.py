"""Tags and pushes of artifacts, and `/v1/registry`: all versions of each model."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field, model_validator

from app.api.artifact_views import ArtifactView, PushView, views_of
from app.api.dependencies import ArtifactsReader, ArtifactsWriter, ServicesParam
from app.api.paging import PageQuery
from app.api.preconditions import UNCHANGED, IdempotencyKey, IfNoneMatch, tagged_answer
from app.api.push_requests import check_push
from app.core.records.ids import new_id
from app.core.records.job_body import PushBody
from app.core.records.push import Push
from app.core.records.specs import Frozen
from app.core.storage.tags import MOST, TagName, model_name

router = APIRouter(prefix="/v1", tags=["artifacts"])

TagNames = Annotated[tuple[TagName, ...], Field(max_length=MOST)]


class ArtifactChange(Frozen):
    """The body of a PATCH: all tags of the artifact, or those to give and to take."""

    tags: TagNames | None = None
    add_tags: TagNames = ()
    remove_tags: TagNames = ()

    @model_validator(mode="after")
    def one_way(self) -> ArtifactChange:
        if self.tags is not None and (self.add_tags or self.remove_tags):
            raise ValueError("give `tags`, which are all of them, or `add_tags` and `remove_tags`")
        if set(self.add_tags) & set(self.remove_tags):
            raise ValueError("a tag can't be given and taken at once")
        return self


class ModelVersions(BaseModel):
    """One source model and what was made of it, newest first."""

    object: Literal["model_versions"] = "model_versions"
    model: str
    tags: dict[str, str]  # to the artifact that each points to
    versions: tuple[ArtifactView, ...]


class Registry(BaseModel):
    object: Literal["list"] = "list"
    data: tuple[ModelVersions, ...]
    has_more: bool
    next: str | None


class RegistryQuery(PageQuery):
    """Filters of the registry."""

    model: str | None = Field(default=None, max_length=1024, description="Only this source model.")
    limit: int = Field(default=200, ge=1, le=1000, description="Artifacts to look at, newest first.")


@router.patch("/artifacts/{artifact_id}")
def change_artifact(
    artifact_id: str,
    body: ArtifactChange,
    request: Request,
    services: ServicesParam,
    principal: ArtifactsWriter,
) -> ArtifactView:
    """Give tags to an artifact and take them. Within a model a tag points to one artifact: it moves."""
    manifest = services.artifacts.get(principal.tenant, artifact_id)
    moves = services.tags.change(
        manifest, added=body.tags or body.add_tags, removed=body.remove_tags, only=body.tags is not None
    )
    request.state.audit_detail = "; ".join(move.text for move in moves)
    return views_of(services, principal.tenant, [manifest])[0]


@router.post("/artifacts/{artifact_id}/push", status_code=202)
def push_artifact(
    artifact_id: str,
    body: PushBody,
    services: ServicesParam,
    principal: ArtifactsWriter,
    idempotency_key: IdempotencyKey = None,
) -> PushView:
    """Send the artifact's files to a hub repository, with a model card. The artifact lists its pushes."""
    manifest = services.artifacts.get(principal.tenant, artifact_id)
    options = body.options
    check_push(services, principal, options, body.hub_token)
    asked = f"push {artifact_id} {options.model_dump_json()}"
    push = Push(
        id=services.idempotency.claim(principal.tenant, idempotency_key, asked, new_id("push")),
        tenant=principal.tenant,
        artifact=manifest.id,
        job=manifest.job,
        options=options,
        has_hub_token=body.hub_token is not None,
        created_at=datetime.now(UTC),
    )
    if body.hub_token is not None:  # before the push is due
        services.hub_tokens.keep(push.id, body.hub_token)
    if services.pushes.create(push):
        return PushView.of(push)
    earlier = services.pushes.get(principal.tenant, push.id, artifact=push.artifact)
    if earlier.has_ended:
        services.hub_tokens.forget(push.id)
    return PushView.of(earlier)


@router.get("/artifacts/{artifact_id}/pushes/{push_id}", response_model=PushView, responses=UNCHANGED)
def read_push(
    artifact_id: str,
    push_id: str,
    services: ServicesParam,
    principal: ArtifactsReader,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """How far a push is, or why it failed."""
    push = services.pushes.get(principal.tenant, push_id, artifact=artifact_id)
    return tagged_answer(PushView.of(push), if_none_match)


@router.get("/registry", response_model=Registry, responses=UNCHANGED)
def read_registry(
    services: ServicesParam,
    principal: ArtifactsReader,
    query: Annotated[RegistryQuery, Query()],
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The tenant's artifacts by the model that they were made of, with its tags."""
    only = services.limits.artifacts(principal.tenant)
    page = services.artifacts.page(principal.tenant, limit=query.limit, after=query.after, only=only)
    chosen = [each for each in page.manifests if query.model in (None, model_name(each.model), each.model)]
    views = views_of(services, principal.tenant, chosen)
    by_model: dict[str, list[ArtifactView]] = {}
    for view in views:
        by_model.setdefault(model_name(view.model), []).append(view)
    data = tuple(
        ModelVersions(
            model=name,
            tags={tag: version.id for version in versions for tag in version.tags},
            versions=tuple(versions),
        )
        for name, versions in by_model.items()
    )
    cursor = page.manifests[-1].id if page.has_more else None
    return tagged_answer(Registry(data=data, has_more=page.has_more, next=cursor), if_none_match)
