"""A model in a folder of this host."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from app.core.errors import ModelRefused

MAX_FILES = 10_000
CHUNK_BYTES = 1 << 24
OnBytes = Callable[[int], None]


class LocalModel:
    """A folder under an allowed root, or `only` one file of it.

    Links are followed only where they stay under an allowed root.
    """

    def __init__(self, folder: Path, roots: Sequence[Path], *, only: str | None = None) -> None:
        self.only = only
        self.roots = tuple(Path(os.path.realpath(root)) for root in roots)
        self.folder = self.allowed(folder)
        if not self.folder.is_dir():
            raise ModelRefused(
                f"there is no folder {folder}",
                code="model_not_found",
                remedy="give the folder that holds config.json and the safetensors files, or one GGUF file",
                param="model",
            )
        self.name = self.folder.as_uri()

    def allowed(self, path: Path) -> Path:
        """The real path behind `path`. Raises ModelRefused if it leaves the allowed roots."""
        real = Path(os.path.realpath(path))
        if not any(real == root or root in real.parents for root in self.roots):
            raise ModelRefused(
                f"{path} is not under a folder from which models may be read",
                code="model_path_forbidden",
                remedy="move it under one of NIBBLE_MODEL_ROOTS, or let the operator add its folder",
                param="model",
            )
        return real

    def list(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        everything = os.walk(self.folder) if self.only is None else [(str(self.folder), [], [self.only])]
        for parent, _, names in everything:
            for name in names:
                path = Path(parent, name)
                with readable(name):
                    status = self.allowed(path).stat() if path.exists() else None
                if status is not None and stat.S_ISREG(status.st_mode):
                    sizes[path.relative_to(self.folder).as_posix()] = status.st_size
            refuse_crowd(self.name, len(sizes))
        return sizes

    def read(self, path: str, start: int, length: int) -> bytes:
        with readable(path), self.allowed(self.folder / path).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def download(self, path: str, dest: Path, on_bytes: OnBytes) -> None:
        with self.allowed(self.folder / path).open("rb") as source, dest.open("wb") as target:
            while chunk := source.read(CHUNK_BYTES):
                target.write(chunk)
                on_bytes(len(chunk))

    def content_key(self) -> str:
        stamps = []
        for path, size in sorted(self.list().items()):
            stamps.append(f"{path}\0{size}\0{(self.folder / path).stat().st_mtime_ns}")
        return hashlib.sha256("\n".join([self.name, *stamps]).encode()).hexdigest()


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Translate operating system errors on a local file into ModelRefused."""
    try:
        yield
    except OSError as fault:
        raise ModelRefused(
            f"{path} can't be read: {fault.strerror}",
            code="model_unreadable",
            remedy="let the service's user read the folder and all files in it",
            param="model",
        ) from fault


def refuse_crowd(name: str, count: int) -> None:
    if count > MAX_FILES:
        raise ModelRefused(
            f"{name} holds more than {MAX_FILES} files",
            code="model_too_many_files",
            remedy="give the folder of one model",
            param="model",
        )
