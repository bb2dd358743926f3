"""A text file that a tenant has uploaded: its manifest, whose creation makes it exist."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from app.core.records.specs import Kept

UPLOADED = "upload:"  # before its id: how calibration and evaluation name it
BYTES_PER_TOKEN = 4  # of UTF-8, roughly, for every tokenizer


class TextPreview(Kept):
    """What was read of the file; None: its beginning does not tell."""

    documents: int | None
    conversations: int | None
    text_bytes: int | None  # of all documents, in UTF-8
    is_estimate: bool  # from the beginning of the file alone
    first: tuple[str, ...]  # the beginnings of the first documents

    def windows(self, sequence_length: int) -> int | None:
        """About how many windows of so many tokens the text gives."""
        return None if self.text_bytes is None else self.text_bytes // BYTES_PER_TOKEN // sequence_length


class DatasetManifest(Kept):
    """The content of `datasets/<id>/manifest.json`. The file lies beside it."""

    version: int = 1
    id: str
    tenant: str
    created_at: datetime
    name: str  # of the file, which says how it is read
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    preview: TextPreview

    @property
    def reference(self) -> str:
        return UPLOADED + self.id
