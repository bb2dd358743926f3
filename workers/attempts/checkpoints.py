"""Checkpoints of a running job in object storage: put there layer by layer, fetched by the next attempt.

A stored checkpoint ends with the SHA-256 of what comes before, in the same object: neither is ever there
without the other. One that differs from its digest is not used: the child computes it again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from app.core.child.assignment import CHECKPOINTS, Checkpointed
from app.core.records.job import Job
from app.core.storage.object_store import ObjectStore
from app.core.storage.storage_keys import checkpoint_prefix

DIGEST_BYTES = 32
PIECE = 1 << 22


class CheckpointMirror:
    """Keeps `work_folder/checkpoints` and the object store alike."""

    def __init__(self, objects: ObjectStore, job: Job, identity: str, work_folder: Path) -> None:
        """`identity` names the work that the checkpoints belong to: checkpoints of other work are ignored."""
        self._objects = objects
        self._prefix = f"{checkpoint_prefix(job.id)}/{identity}"
        self._older_prefix = f"{checkpoint_prefix(job.retry_of)}/{identity}" if job.retry_of else None
        self._folder = work_folder / CHECKPOINTS
        self._folder.mkdir(parents=True, exist_ok=True)
        self.damaged: list[str] = []  # keys that were stored, but differed from their digest
        self._pending: list[Checkpointed] = []
        self._obsolete: set[str] = set()  # stored keys that the next stored one replaces

    def restore(self, on_file: Callable[[], None]) -> list[str]:
        """Bring back what an earlier attempt, or the job that this one retries, has put; the keys."""
        restored = self._download(self._prefix, on_file)
        if restored or self._older_prefix is None:
            return restored
        restored = self._download(self._older_prefix, on_file)
        for key in restored:
            on_file()
            self._store(key)
        return restored

    def put(self, message: Checkpointed) -> None:
        """Store a complete checkpoint, then drop the one that it replaces.

        Raises Unavailable if the storage fails; the checkpoint then goes with the next one, in order.
        """
        self._pending.append(message)
        while self._pending:
            self._put_one(self._pending[0])
            self._pending.pop(0)

    def _put_one(self, message: Checkpointed) -> None:
        if message.replaces is not None:
            self._obsolete.add(message.replaces)
        try:
            self._store(message.key)
        except FileNotFoundError:
            # The child is ahead of us and has replaced this file; the newer one is announced next. Until that
            # is stored, the old one stays: the store always holds a set to resume from.
            return
        for key in sorted(self._obsolete):
            self._objects.delete(f"{self._prefix}/{key}")
        self._obsolete.clear()

    def _store(self, key: str) -> None:
        with (self._folder / key).open("rb") as file:
            pieces = sealed(file)
            is_small = os.fstat(file.fileno()).st_size <= PIECE
            # One request can be sent again when its answer is lost; an upload in parts can't.
            self._objects.put(f"{self._prefix}/{key}", b"".join(pieces) if is_small else pieces)

    def _download(self, prefix: str, on_file: Callable[[], None]) -> list[str]:
        keys = []
        for head in self._objects.list(prefix):
            on_file()
            key = head.key.removeprefix(prefix + "/")
            path = self._folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            self._objects.download(head.key, path)
            if unseal(path):
                keys.append(key)
            else:
                path.unlink()
                self.damaged.append(key)
        return keys


def sealed(file: IO[bytes]) -> Iterator[bytes]:
    """The file's bytes, then their SHA-256."""
    digest = hashlib.sha256()
    while chunk := file.read(PIECE):
        digest.update(chunk)
        yield chunk
    yield digest.digest()


def unseal(path: Path) -> bool:
    """Cut the digest off a downloaded checkpoint; False if it isn't that of the bytes before."""
    left = path.stat().st_size - DIGEST_BYTES
    digest = hashlib.sha256()
    with path.open("r+b") as file:
        while left > 0:
            chunk = file.read(min(PIECE, left))
            digest.update(chunk)
            left -= len(chunk)
        if left < 0 or file.read() != digest.digest():
            return False
        file.seek(-DIGEST_BYTES, os.SEEK_END)
        file.truncate()
    return True
