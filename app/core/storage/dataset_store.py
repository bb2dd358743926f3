"""Datasets that tenants have uploaded, listed by their manifests: without one a dataset does not exist.

datasets/<id>/manifest.json    the commit point, created once
datasets/<id>/content          the file, as it came
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from pydantic import ValidationError

from app.core.access.limits import TenantLimits
from app.core.errors import NotFound, RecordUnreadable
from app.core.records.dataset import DatasetManifest
from app.core.records.ids import check_cursor, is_id
from app.core.records.specs import Frozen
from app.core.storage.object_store import ObjectStore
from app.core.storage.storage_keys import DATASETS, dataset_content_key, dataset_folder, dataset_manifest_key

log = logging.getLogger(__name__)


class DatasetPage(Frozen):
    manifests: tuple[DatasetManifest, ...]
    has_more: bool


class DatasetStore:
    """The manifests, and the removal of what they name."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def create(self, limits: TenantLimits, manifest: DatasetManifest) -> None:
        """Make an uploaded file exist, and count its bytes for its tenant."""
        limits.add_artifact(manifest.tenant, manifest.id, manifest.size)
        self._objects.create(dataset_manifest_key(manifest.id), manifest.model_dump_json().encode())

    def find(self, dataset_id: str) -> DatasetManifest | None:
        """Raises RecordUnreadable for a manifest that is damaged, or of another version."""
        try:
            content = self._objects.get(dataset_manifest_key(dataset_id))
            return DatasetManifest.model_validate_json(content)
        except NotFound:
            return None
        except ValidationError as fault:
            raise RecordUnreadable(
                f"the manifest of {dataset_id} is damaged, or another version of the service wrote it",
                remedy=f"finish the upgrade, or let the operator remove datasets/{dataset_id} from storage",
            ) from fault

    def get(self, tenant: str, dataset_id: str) -> DatasetManifest:
        """The manifest; NotFound also for another tenant's."""
        manifest = self.find(dataset_id) if is_id("ds", dataset_id) else None
        if manifest is None or manifest.tenant != tenant:
            raise NotFound(
                f"there is no dataset {dataset_id[:200]}",
                code="dataset_not_found",
                remedy="`nibble datasets list` and GET /v1/datasets list yours",
            )
        return manifest

    def page(self, tenant: str, *, limit: int, after: str | None) -> DatasetPage:
        """The tenant's datasets, newest first, older than the id `after`."""
        check_cursor("ds", after)
        manifests: list[DatasetManifest] = []
        for manifest in self._newest_first(after):
            if manifest.tenant == tenant:
                manifests.append(manifest)
            if len(manifests) > limit:
                break
        return DatasetPage(manifests=tuple(manifests[:limit]), has_more=len(manifests) > limit)

    def _newest_first(self, after: str | None) -> Iterator[DatasetManifest]:
        for dataset_id in reversed(self._objects.list_folders(DATASETS)):
            if is_id("ds", dataset_id) and (after is None or dataset_id < after):
                try:
                    manifest = self.find(dataset_id)
                except RecordUnreadable as fault:
                    log.warning("left out of a list: %s", fault.message)
                    continue
                if manifest is not None:  # an upload goes on, or was interrupted
                    yield manifest

    def hide(self, manifest: DatasetManifest) -> None:
        """From now on no job can be submitted with it."""
        self._objects.delete(dataset_manifest_key(manifest.id))

    def show(self, manifest: DatasetManifest) -> None:
        """Take `hide` back."""
        self._objects.create(dataset_manifest_key(manifest.id), manifest.model_dump_json().encode())

    def discard(self, limits: TenantLimits, manifest: DatasetManifest) -> None:
        """Remove a dataset: the manifest before the file, so that no half of it is ever listed."""
        self.hide(manifest)
        self._objects.delete_prefix(dataset_folder(manifest.id))
        limits.remove_artifact(manifest.tenant, manifest.id)

    def read(self, dataset_id: str, start: int, end: int) -> bytes:
        return self._objects.read_range(dataset_content_key(dataset_id), start, end)

    def stream(self, manifest: DatasetManifest) -> Iterator[bytes]:
        return self._objects.stream(dataset_content_key(manifest.id), 0, manifest.size)
