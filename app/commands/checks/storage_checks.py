"""Checks of object storage: write, read, delete and conditional write."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

from app.commands.checks.check import Check
from app.core.errors import NibbleError

if TYPE_CHECKING:
    from app.core.settings import Settings
    from app.core.storage.object_store import ObjectStore

NAME = "object storage"
PROBE = b"written by nibble doctor"


def check_storage(settings: Settings) -> Check:
    from app.core.storage.object_store import ObjectStore

    key = f"doctor/{uuid4().hex}"
    try:
        store = ObjectStore(settings.object_store_url)
        try:
            fault = probe(store, key)
        finally:
            store.delete(key)
        if store.head(key) is not None:
            fault = fault or Check(NAME, "problem", f"{key} still exists after its deletion", "allow deletes")
    except NibbleError as refused:
        remedy = refused.remedy or "correct NIBBLE_STORAGE_URL"
        return Check(NAME, "problem", refused.message, remedy)
    return fault or Check(
        NAME, "ok", f"{settings.object_store_url}: writes, reads, conditional writes, deletes"
    )


def probe(store: ObjectStore, key: str) -> Check | None:
    """The first problem; None if there is none."""
    if not store.create(key, PROBE):
        return Check(
            NAME, "problem", "creating a new key fails as if it existed", "check the storage's policies"
        )
    if store.create(key, b"other"):
        finding = "a conditional write (If-None-Match: *) replaced an object: two attempts could both publish"
        remedy = "use storage with conditional writes: AWS S3, MinIO, SeaweedFS 3.8x or a folder"
        return Check(NAME, "problem", finding, remedy)
    if store.get(key) != PROBE or store.read_range(key, 2, 6) != PROBE[2:6]:
        return Check(NAME, "problem", "what it returns is not what was written", "don't use this storage")
    return None
