"""What the API says of artifacts: the manifest, which never changes, with its tags and pushes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel

from app.api.services import Services
from app.core.formats.registry import FormatName
from app.core.records.artifact import ArtifactFile, ArtifactManifest
from app.core.records.job import Problem
from app.core.records.push import Push, PushState
from app.core.records.specs import Recipe


class PushView(BaseModel):
    object: Literal["push"] = "push"
    id: str
    artifact: str
    state: PushState
    repo_id: str
    revision: str | None
    private: bool
    sent_bytes: int
    attempt: int
    created_at: datetime
    finished_at: datetime | None
    url: str | None
    commit: str | None
    commit_url: str | None
    error: Problem | None  # why it failed, or what it waits after
    links: dict[str, str]

    @classmethod
    def of(cls, push: Push) -> Self:
        here = f"/v1/artifacts/{push.artifact}"
        own = set(cls.model_fields) - {"object", "links", *type(push.options).model_fields}
        return cls(
            **push.model_dump(include=own),
            **push.options.model_dump(include={"repo_id", "revision", "private"}),
            links={"self": f"{here}/pushes/{push.id}", "artifact": here},
        )


class ArtifactView(BaseModel):
    object: Literal["artifact"] = "artifact"
    id: str
    job: str
    created_at: datetime
    model: str
    model_digest: str
    adapter: str | None  # that was merged into the weights before they were quantized
    adapter_digest: str | None
    recipe: Recipe
    format: FormatName
    size: int
    summary: dict[str, Any]
    files: tuple[ArtifactFile, ...]
    tags: tuple[str, ...]
    pushes: tuple[PushView, ...]  # oldest first
    links: dict[str, str]

    @classmethod
    def of(cls, manifest: ArtifactManifest, tags: Sequence[str], pushes: Sequence[Push]) -> Self:
        here = f"/v1/artifacts/{manifest.id}"
        return cls(
            id=manifest.id,
            job=manifest.job,
            created_at=manifest.created_at,
            model=manifest.model,
            model_digest=manifest.model_digest,
            adapter=manifest.adapter,
            adapter_digest=manifest.adapter_digest,
            recipe=manifest.recipe,
            format=manifest.format,
            size=manifest.size,
            summary=manifest.summary,
            files=manifest.files,
            tags=tuple(tags),
            pushes=tuple(PushView.of(push) for push in pushes),
            links={"self": here, "files": f"{here}/files", "job": f"/v1/jobs/{manifest.job}"},
        )


class ArtifactList(BaseModel):
    object: Literal["list"] = "list"
    data: tuple[ArtifactView, ...]
    has_more: bool
    next: str | None


def views_of(
    services: Services, tenant: str, manifests: Sequence[ArtifactManifest]
) -> tuple[ArtifactView, ...]:
    tags = services.tags.by_artifact(tenant)
    pushes = services.pushes.of(manifest.id for manifest in manifests)
    return tuple(
        ArtifactView.of(manifest, tags.get(manifest.id, ()), pushes.get(manifest.id, ()))
        for manifest in manifests
    )
