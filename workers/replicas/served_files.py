"""What a replica's server opens: the files of an artifact, or those of the model it was made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from app.core.deployments.deployment import Deployment
from app.core.deployments.originals import about_original, require_unchanged, why_own_server
from app.core.records.artifact import ArtifactManifest
from app.core.settings import Settings
from app.core.sources.fetching import ModelCache
from app.core.storage.artifact_store import ArtifactStore
from app.core.storage.cached_folders import Check
from workers.replicas.artifact_cache import ArtifactCache


class ServedFiles(NamedTuple):
    """Files on this host. `adapter` is merged into an original; `why_own` is why vLLM can't serve it."""

    folder: Path
    is_original: bool = False
    adapter: Path | None = None
    why_own: str | None = None


@contextmanager
def served_files(
    deployment: Deployment, artifacts: ArtifactStore, cache: ArtifactCache, settings: Settings, check: Check
) -> Iterator[ServedFiles]:
    """What the deployment serves, downloaded if need be; it stays on this host while the block runs."""
    spec = deployment.spec
    manifest = artifacts.get(deployment.tenant, spec.artifact)
    if not spec.original:
        with cache.in_use(manifest.id):
            yield ServedFiles(cache.fetch(manifest, check))
        return
    with ModelCache(settings.model_cache_dir, settings) as models:
        yield original_files(manifest, models, check)


def original_files(manifest: ArtifactManifest, models: ModelCache, check: Check) -> ServedFiles:
    """Raises ModelRefused for a source that is gone, forbidden or another one by now."""
    with about_original(manifest):
        model = models.fetch(manifest.model, lambda _: check(), manifest.adapter)
    require_unchanged(manifest, model.digest, None if model.adapter is None else model.adapter.digest)
    return ServedFiles(
        folder=model.folder,
        is_original=True,
        adapter=None if model.adapter is None else model.adapter.folder,
        why_own=why_own_server(is_gguf=model.is_gguf, has_adapter=model.adapter is not None),
    )
