"""The files of a model wherever they lie: listed, read in ranges, downloaded.

`open_model` is the door: it turns a reference into a `ModelFiles`. Reading a model's headers and refusing
unsafe ones is `app.core.sources.model_headers`; both are used at submission and by the worker.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from obstore import exceptions as store_errors
from obstore.store import S3Store

from app.core.errors import ModelRefused, NibbleError, Unavailable
from app.core.object_store import open_bucket
from app.core.outgoing.guard import IpNetwork
from app.core.sources.hub_model import HubModel
from app.core.sources.model_headers import ModelHeaders, inspect_model, model_digest, needed_files
from app.core.sources.model_reference import ModelReference, parse_model_reference

__all__ = [
    "HubModel",
    "LocalModel",
    "ModelFiles",
    "ModelHeaders",
    "ModelReference",
    "S3Model",
    "inspect_model",
    "model_digest",
    "needed_files",
    "open_model",
    "parse_model_reference",
]

MAX_FILES = 10_000
PIECE = 1 << 24
OnBytes = Callable[[int], None]


class ModelFiles(Protocol):
    """A model's files. `name` is a reference that always means the same content, where one exists."""

    name: str

    def list(self) -> dict[str, int]:
        """Size of every file by relative path."""

    def read(self, path: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer at the end of the file."""

    def download(self, path: str, dest: Path, on_bytes: OnBytes) -> None:
        """Copy a file to `dest`; `on_bytes` hears of every piece and may raise to stop."""

    def content_key(self) -> str:
        """A digest that changes when a file does, found without reading contents."""

    def known_sha256(self, path: str) -> str | None:
        """The file's SHA-256 where the source states it, else None."""


def open_model(
    reference: str, *, model_roots: Sequence[Path], networks: Sequence[IpNetwork] = ()
) -> ModelFiles:
    """The files behind a reference. A hub branch or tag is resolved to a commit here, once.

    `networks` are those besides the public internet to which requests may go.
    """
    parsed = parse_model_reference(reference)
    if parsed.scheme == "file":
        return LocalModel(Path(parsed.path), model_roots)
    if parsed.scheme == "s3":
        return S3Model(str(parsed), open_bucket(parsed.bucket or "", prefix=parsed.path))
    return HubModel(parsed.path, parsed.revision, networks=networks)


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
                remedy="give the folder that holds config.json and the safetensors files",
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
            while piece := source.read(PIECE):
                target.write(piece)
                on_bytes(len(piece))

    def content_key(self) -> str:
        stamps = []
        for path, size in sorted(self.list().items()):
            stamps.append(f"{path}\0{size}\0{(self.folder / path).stat().st_mtime_ns}")
        return hashlib.sha256("\n".join([self.name, *stamps]).encode()).hexdigest()

    def known_sha256(self, path: str) -> str | None:
        return None


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turns what the system says of a local file into a refusal."""
    try:
        yield
    except OSError as fault:
        raise ModelRefused(
            f"{path} can't be read: {fault.strerror}",
            code="model_unreadable",
            remedy="let the service's user read the folder and all files in it",
            param="model",
        ) from fault


class S3Model:
    """The objects below a prefix of an S3-compatible store, or `only` one of them."""

    def __init__(self, name: str, store: S3Store, *, only: str | None = None) -> None:
        self.only = only
        self.name = name
        self.store = store
        self._stamps: dict[str, str] = {}  # path -> ETag as listed
        self._sizes: dict[str, int] = {}

    def list(self) -> dict[str, int]:
        if self._sizes:
            return dict(self._sizes)
        with store_access(self.name):
            pages = self.store.list() if self.only is None else [[self.store.head(self.only)]]
            for page in pages:
                for entry in page:
                    path, size = str(entry["path"]), int(entry["size"])
                    self._sizes[path], self._stamps[path] = size, entry["e_tag"] or ""
                refuse_crowd(self.name, len(self._sizes))
        if not self._sizes:
            raise ModelRefused(
                f"{self.name} holds no objects",
                code="model_not_found",
                remedy="check bucket and prefix, and that the service's credentials may list them",
                param="model",
            )
        return dict(self._sizes)

    def read(self, path: str, start: int, length: int) -> bytes:
        end = min(start + length, self.list().get(path, 0))
        if end <= start:
            return b""
        with store_access(f"{self.name}/{path}"):
            return bytes(self.store.get_range(path, start=start, end=end))

    def download(self, path: str, dest: Path, on_bytes: OnBytes) -> None:
        # A request per piece: one long answer would run into the store client's time limit.
        with dest.open("wb") as target:
            while piece := self.read(path, target.tell(), PIECE):
                target.write(piece)
                on_bytes(len(piece))

    def content_key(self) -> str:
        lines = [f"{path}\0{size}\0{self._stamps[path]}" for path, size in sorted(self.list().items())]
        return hashlib.sha256("\n".join([self.name, *lines]).encode()).hexdigest()

    def known_sha256(self, path: str) -> str | None:
        return None


@contextmanager
def store_access(name: str) -> Iterator[None]:
    """Turns the store's faults into ours."""

    def refused(message: str, code: str) -> ModelRefused:
        remedy = "check bucket, prefix and the service's credentials"
        return ModelRefused(message, code=code, remedy=remedy, param="model")

    try:
        yield
    except NibbleError:
        raise
    except (FileNotFoundError, store_errors.NotFoundError) as fault:
        raise refused(f"{name} does not exist", "model_not_found") from fault
    except (store_errors.PermissionDeniedError, store_errors.UnauthenticatedError) as fault:
        raise refused(f"{name} may not be read", "model_forbidden") from fault
    except store_errors.BaseError as fault:
        # The library has no class of its own for this answer to a listing.
        if "NoSuchBucket" in str(fault):
            raise refused(f"{name} does not exist", "model_not_found") from fault
        first_line = str(fault).partition("\n")[0]
        raise Unavailable(f"{name} cannot be read: {first_line}", remedy="try again later") from fault


def refuse_crowd(name: str, count: int) -> None:
    if count > MAX_FILES:
        raise ModelRefused(
            f"{name} holds more than {MAX_FILES} files",
            code="model_too_many_files",
            remedy="give the folder of one model",
            param="model",
        )
