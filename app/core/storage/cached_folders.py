"""Downloaded folders that the processes of a host share: each appears complete, and stays while in use.

NAME/          all files are there
NAME.partial/  files of an unfinished download
NAME.lock      held while NAME is downloaded
NAME.use       shared by all who use NAME; its modification time is the last use

The kernel frees a lock when its process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from app.core.storage.file_lock import try_lock

USE = ".use"
PARTIAL = ".partial"
WAIT_S = 0.2

Check = Callable[[], None]  # called often; may raise to stop


class CachedFolders:
    """Folders below `root`, of at most `most_bytes` in all, where that is not 0."""

    def __init__(self, root: Path, most_bytes: int = 0) -> None:
        self.root = root
        self._most_bytes = most_bytes

    @contextmanager
    def locked(self, name: str, check: Check) -> Iterator[None]:
        """Hold the download lock of the folder; `check` is called while waiting for it."""
        with self._lock_file(f"{name}.lock") as lock:
            while not try_lock(lock):
                check()
                time.sleep(WAIT_S)
            yield

    @contextmanager
    def in_use(self, name: str) -> Iterator[None]:
        """Keep the folder from being removed, by any process, while the block runs."""
        with self._lock_file(f"{name}{USE}") as use:
            fcntl.flock(use, fcntl.LOCK_SH)
            os.utime(use.fileno())
            yield

    def fill(self, name: str, sizes: Mapping[str, int], download: Callable[[str, Path], None]) -> Path:
        """Download missing files and return the folder; `download` gets a path and the file to write.

        Files of the right size, also from an earlier try, are not downloaded again. Call it under `locked`.
        """
        folder = self.root / name
        with self.in_use(name):
            stage = folder if folder.exists() else self.root / f"{name}{PARTIAL}"
            if stage != folder:
                self.make_room(sum(sizes.values()))
            for path, size in sorted(sizes.items()):
                file = stage / path
                if file.is_file() and file.stat().st_size == size:
                    continue
                file.parent.mkdir(parents=True, exist_ok=True)
                unfinished = file.with_name(f"{file.name}.part")
                download(path, unfinished)
                unfinished.replace(file)
            if stage != folder:
                stage.rename(folder)
        return folder

    def make_room(self, needed: int) -> list[str]:
        """Remove the least recently used folders until `needed` more bytes fit; returns their names.

        Folders in use stay, and a download that does not fit goes ahead: the limit bounds the cache, not the
        running work.
        """
        sizes = {path: folder_bytes(path) for path in self.root.iterdir() if path.is_dir()}
        removed: list[str] = []
        for path in sorted(sizes, key=self._last_use):
            if not self._most_bytes or sum(sizes.values()) + needed <= self._most_bytes:
                break
            if self.remove(path.name):
                del sizes[path]
                removed.append(path.name)
        return removed

    def remove(self, name: str) -> bool:
        """Remove a folder, or NAME.partial, unless it is in use; returns whether it was removed."""
        folder = self.root / name
        if not folder.exists():
            return False
        with self._use(folder).open("a") as use:
            if not try_lock(use):
                return False
            gone = folder.with_name(f"{name}.removed")
            shutil.rmtree(gone, ignore_errors=True)
            folder.rename(gone)  # at once: a half-removed folder must not look complete
            shutil.rmtree(gone, ignore_errors=True)
        return True

    def _lock_file(self, name: str) -> IO[str]:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        return (self.root / name).open("a")

    def _use(self, folder: Path) -> Path:
        return folder.with_name(folder.name.removesuffix(PARTIAL) + USE)

    def _last_use(self, folder: Path) -> float:
        use = self._use(folder)
        return use.stat().st_mtime if use.exists() else 0.0


def folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
