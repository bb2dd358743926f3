"""The manifest of a published artifact: the single record whose creation makes it exist."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import Field

from app.core.formats.registry import FormatName
from app.core.records.specs import Kept, Recipe


class ArtifactFile(Kept):
    path: str  # relative, `/` as separator
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ArtifactManifest(Kept):
    """The content of `artifacts/<id>/manifest.json`. Files lie under `artifacts/<id>/<prefix>/`."""

    version: int = 1
    id: str
    tenant: str
    job: str
    created_at: datetime
    model: str
    model_digest: str
    adapter: str | None = None  # that was merged into the weights before they were quantized
    adapter_digest: str | None = None
    recipe: Recipe
    format: FormatName
    prefix: str
    summary: dict[str, Any] = Field(default_factory=dict)
    files: tuple[ArtifactFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)
