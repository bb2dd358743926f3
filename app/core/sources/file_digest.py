"""The SHA-256 of files on this host."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

CHUNK_BYTES = 1 << 22


def file_sha256(path: Path, check: Callable[[], None] | None = None) -> str:
    """In hex. `check` is called after each chunk and may raise to stop: a large file takes many seconds."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if check is not None:
                check()
    return digest.hexdigest()
