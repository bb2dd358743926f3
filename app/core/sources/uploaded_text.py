"""A text that was uploaded to the service, as a source like any other file; and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from app.core.errors import NotFound, RecordUnreadable, TextRefused
from app.core.records.dataset import UPLOADED, DatasetManifest
from app.core.settings import Settings
from app.core.sources.text_source import TextFile, open_text
from app.core.storage.dataset_store import DatasetStore
from app.core.storage.object_store import ObjectStore


class UploadedText:
    """`ModelFiles` of one file: it never changes, and its digest is in its manifest."""

    def __init__(self, store: DatasetStore, manifest: DatasetManifest) -> None:
        self.name = manifest.reference
        self._store = store
        self._manifest = manifest

    def list(self) -> dict[str, int]:
        return {self._manifest.name: self._manifest.size}

    def read(self, path: str, start: int, length: int) -> bytes:
        return self._store.read(self._manifest.id, start, min(start + length, self._manifest.size))

    def download(self, path: str, dest: Path, on_bytes: Callable[[int], None]) -> None:
        with dest.open("wb") as target:
            for chunk in self._store.stream(self._manifest):
                target.write(chunk)
                on_bytes(len(chunk))

    def content_key(self) -> str:
        return self._manifest.sha256


def open_job_text(reference: str, settings: Settings) -> TextFile:
    """The file behind a reference of a job's text; an uploaded one is the tenant's that `settings` act for.

    Raises TextRefused as `open_text`, also for another tenant's upload.
    """
    if not reference.startswith(UPLOADED):
        return open_text(reference, **settings.source_access)
    dataset_id = reference.removeprefix(UPLOADED)
    if settings.tenant is None:
        raise TextRefused(
            f"dataset {reference[:200]!r} lies in a service, and this runs without one",
            code="text_source_invalid",
            remedy="name the file itself",
        )
    store = DatasetStore(ObjectStore(settings.object_store_url))
    try:
        manifest = store.get(settings.tenant, dataset_id)
    except (NotFound, RecordUnreadable) as fault:
        raise TextRefused(fault.message, code=fault.code, remedy=fault.remedy) from fault
    return TextFile(UploadedText(store, manifest), manifest.name, manifest.size)
