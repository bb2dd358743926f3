"""The files of a model on the hub, in S3 or in a local folder: listed, read in ranges, downloaded.

`open_model` turns a reference into a `ModelFiles`. Reading a model's headers and refusing
unsafe ones is `app.core.sources.model_headers`; both are used at submission and by the worker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from obstore import exceptions as store_errors
from obstore.store import S3Store
from pydantic import SecretStr

from app.core.errors import ModelRefused, NibbleError, Unavailable
from app.core.outgoing.address_guard import IpNetwork
from app.core.sources.adapter_config import about_adapter
from app.core.sources.hub_model import HubModel
from app.core.sources.local_model import LocalModel, refuse_crowd
from app.core.sources.model_headers import ModelHeaders, inspect_model, model_digest
from app.core.sources.model_reference import ModelReference, parse_model_reference
from app.core.storage.object_store import open_bucket

__all__ = [
    "HubModel",
    "LocalModel",
    "ModelFiles",
    "ModelHeaders",
    "ModelReference",
    "S3Model",
    "inspect_model",
    "model_digest",
    "open_adapter",
    "open_model",
    "parse_model_reference",
]

CHUNK_BYTES = 1 << 24
OnBytes = Callable[[int], None]


class ModelFiles(Protocol):
    """A model's files. `name` is a reference that always means the same content, where one exists."""

    name: str

    def list(self) -> dict[str, int]:
        """Size of every file by relative path."""

    def read(self, path: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer at the end of the file."""

    def download(self, path: str, dest: Path, on_bytes: OnBytes) -> None:
        """Copy a file to `dest`; `on_bytes` gets the size of each chunk and may raise to stop."""

    def content_key(self) -> str:
        """A digest that changes when a file does, found without reading contents."""


def open_model(
    reference: str,
    *,
    model_roots: Sequence[Path],
    networks: Sequence[IpNetwork] = (),
    hub_token: SecretStr | None = None,
) -> ModelFiles:
    """The files behind a reference. A hub branch or tag is resolved to a commit here, once.

    `networks` are those besides the public internet to which requests may go; `hub_token`, by default this
    host's, is what the hub is asked with.
    """
    parsed = parse_model_reference(reference)
    if parsed.scheme == "file":
        return LocalModel(Path(parsed.path), model_roots)
    if parsed.scheme == "s3":
        return S3Model(str(parsed), open_bucket(parsed.bucket or "", prefix=parsed.path))
    return HubModel(parsed.path, parsed.revision, networks=networks, token=hub_token)


def open_adapter(
    reference: str,
    *,
    model_roots: Sequence[Path],
    networks: Sequence[IpNetwork] = (),
    hub_token: SecretStr | None = None,
) -> ModelFiles:
    """The files behind an adapter's reference, which has the forms and the rules of a model's."""
    with about_adapter():
        return open_model(reference, model_roots=model_roots, networks=networks, hub_token=hub_token)


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
        # A request per chunk: one long answer would run into the store client's time limit.
        with dest.open("wb") as target:
            while chunk := self.read(path, target.tell(), CHUNK_BYTES):
                target.write(chunk)
                on_bytes(len(chunk))

    def content_key(self) -> str:
        lines = [f"{path}\0{size}\0{self._stamps[path]}" for path, size in sorted(self.list().items())]
        return hashlib.sha256("\n".join([self.name, *lines]).encode()).hexdigest()


@contextmanager
def store_access(name: str) -> Iterator[None]:
    """Translate the store's errors into the service's."""

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
