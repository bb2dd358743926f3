"""Deployments as OpenAI's model objects, with what vLLM adds and what a quantized model is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.api.least_recent import LeastRecent
from app.core.deployments.deployment import LiveDeployment
from app.core.errors import NibbleError
from app.core.records.artifact import ArtifactManifest
from app.core.storage.artifact_store import ArtifactStore

MAX_CARDS = 4096
Document = dict[str, Any]


class ModelCards:
    """Reads an artifact's manifest once: it never changes."""

    def __init__(self, artifacts: ArtifactStore) -> None:
        self._artifacts = artifacts
        self._origins: LeastRecent[str, Document] = LeastRecent(MAX_CARDS)

    def of_all(self, lives: Sequence[LiveDeployment]) -> list[Document]:
        """A card for each name."""
        return [self.of(live, name) for live in lives for name in live.spec.names]

    def of(self, live: LiveDeployment, name: str) -> Document:
        """The card under one of its names; the parent of an alias is the deployment."""
        lengths = [replica.max_model_len for replica in live.replicas if replica.max_model_len is not None]
        return {
            "id": name,
            "object": "model",
            "created": int(live.deployment.created_at.timestamp()),
            "owned_by": "nibble",
            "max_model_len": min(lengths, default=None),
            "permission": [],
            **self._origin(live),
            **({"parent": live.spec.name} if name != live.spec.name else {}),
        }

    def _origin(self, live: LiveDeployment) -> Document:
        """What is served, what that was made of, and how; while the artifact can't be read, its id alone."""
        subject = live.spec.served.subject
        origin = self._origins.get(subject)
        if origin is None:
            try:
                manifest = self._artifacts.get(live.deployment.tenant, live.spec.artifact)
            except NibbleError:
                return {"root": live.spec.artifact, "parent": None, "quantization": None}
            origin = original_of(manifest) if live.spec.original else quantized_of(manifest)
            self._origins.put(subject, origin)
        return origin


def quantized_of(manifest: ArtifactManifest) -> Document:
    """An artifact: its parent is the model that was quantized."""
    recipe = manifest.recipe.model_dump(
        mode="json", include={"method", "scheme", "bits", "group_size", "symmetric"}
    )
    return {
        "root": manifest.id,
        "parent": manifest.model,
        "quantization": {**recipe, "format": manifest.format},
    }


def original_of(manifest: ArtifactManifest) -> Document:
    """The model that was quantized; with an adapter merged into it, that of the model, as vLLM shows one."""
    return {
        "root": manifest.adapter or manifest.model,
        "parent": None if manifest.adapter is None else manifest.model,
        "quantization": None,
    }
