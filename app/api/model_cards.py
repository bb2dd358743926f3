"""Deployments as OpenAI's model objects, with what vLLM adds and what a quantized model is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.api.least_recent import LeastRecent
from app.core.deployments.deployment import LiveDeployment
from app.core.errors import NibbleError
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
            "root": live.spec.artifact,
            "max_model_len": min(lengths, default=None),
            "permission": [],
            **self._origin(live),
            **({"parent": live.spec.name} if name != live.spec.name else {}),
        }

    def _origin(self, live: LiveDeployment) -> Document:
        """The model that was quantized, and how; null while the artifact can't be read."""
        origin = self._origins.get(live.spec.artifact)
        if origin is None:
            try:
                manifest = self._artifacts.get(live.deployment.tenant, live.spec.artifact)
            except NibbleError:
                return {"parent": None, "quantization": None}
            named = {"method", "scheme", "bits", "group_size", "symmetric"}
            recipe = manifest.recipe.model_dump(mode="json", include=named)
            origin = {"parent": manifest.model, "quantization": {**recipe, "format": manifest.format}}
            self._origins.put(live.spec.artifact, origin)
        return origin
