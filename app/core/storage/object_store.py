"""Objects by key in a local folder, an S3 bucket or memory, over obstore.

Keys are built from ids, never from user text, and are checked here again. Every put is atomic; `create`
is the conditional write that commits an artifact.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, MemoryStore, S3Store

from app.core.errors import InvalidRequest, NotFound, Unavailable
from app.core.faults.system_faults import system_fault
from app.core.records.specs import Frozen

KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]*(?:/[A-Za-z0-9_][A-Za-z0-9._=+-]*)*")
MAX_KEY_LENGTH = 900  # S3 allows 1024 bytes, of which the URL's prefix takes a part
CHUNK_BYTES = 8 * 1024**2
PRESIGNED_S = 900


class ObjectHead(Frozen):
    """Size and entity tag of an object."""

    key: str
    size: int
    etag: str | None


def check_key(key: str) -> str:
    if len(key) > MAX_KEY_LENGTH or KEY.fullmatch(key) is None:
        raise InvalidRequest(
            f"{key[:200]!r} is not a valid object key",
            code="invalid_key",
            remedy="use letters, digits and ._=+- in parts separated by single slashes",
        )
    return key


def open_store(url: str) -> LocalStore | MemoryStore | S3Store:
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.strip("/"):
        return LocalStore(Path(unquote(parts.path)), automatic_cleanup=True, mkdir=True)
    if parts.scheme == "memory":
        return MemoryStore()
    if parts.scheme == "s3" and parts.netloc:
        return open_bucket(parts.netloc, prefix=parts.path.strip("/") or None)
    raise InvalidRequest(
        f"{url!r} is not a storage URL",
        code="storage_url_invalid",
        remedy="use file:///folder, s3://bucket/prefix or memory:///",
        param="NIBBLE_STORAGE_URL",
    )


def open_bucket(bucket: str, *, prefix: str | None = None) -> S3Store:
    """A bucket reached with the usual `AWS_*` variables; plain http only for an http endpoint."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return S3Store(
        bucket,
        prefix=prefix,
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=5),
            "read_timeout": timedelta(seconds=30),
            "timeout": timedelta(seconds=300),
        },
        retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=30)},
    )


@contextmanager
def translated(key: str) -> Iterator[None]:
    """Translate storage errors into the service's."""
    try:
        yield
    except FileNotFoundError as fault:
        raise NotFound(f"there is no object {key}", code="object_not_found") from fault
    except (BaseError, OSError) as fault:
        first_line = str(fault).partition("\n")[0]
        of_the_host = system_fault(fault, "the folder of NIBBLE_STORAGE_URL")
        raise Unavailable(
            f"object storage failed at {key}: {first_line}",
            code="storage_unavailable",
            remedy=of_the_host.remedy
            if of_the_host is not None
            else "check NIBBLE_STORAGE_URL, the AWS_* variables and that the storage answers",
        ) from fault


class ObjectStore:
    """The objects below one URL: `file:///folder`, `s3://bucket/prefix` or `memory:///`."""

    def __init__(self, url: str) -> None:
        self.url = url
        with translated(url):
            self._store = open_store(url)

    @property
    def can_presign(self) -> bool:
        return isinstance(self._store, S3Store)

    def put(self, key: str, content: bytes | Path | Iterator[bytes]) -> None:
        """Write an object, atomically, replacing what was there."""
        try:
            with translated(check_key(key)):
                obstore.put(self._store, key, content)
        except NotFound as fault:
            if isinstance(content, Path) and not content.exists():
                raise
            # A multipart upload is gone when its completion is repeated because the first answer was lost.
            raise Unavailable(
                f"storage lost the upload of {key}",
                code="storage_unavailable",
                remedy="write it again",
            ) from fault

    async def put_as_it_comes(self, key: str, chunks: AsyncIterator[bytes]) -> None:
        """As `put`, on the event loop, of content that arrives."""
        with translated(check_key(key)):
            await obstore.put_async(self._store, key, chunks)

    def create(self, key: str, content: bytes) -> bool:
        """Write an object if its key is free; False if it exists already."""
        with translated(check_key(key)):
            try:
                obstore.put(self._store, key, content, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            return True

    def get(self, key: str) -> bytes:
        with translated(check_key(key)):
            return bytes(obstore.get(self._store, key).bytes())

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (exclusive), cut at the object's end."""
        if end <= start:
            return b""
        with translated(check_key(key)):
            return bytes(obstore.get_range(self._store, key, start=start, end=end))

    def stream(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """Bytes `start` to `end` (exclusive) in chunks.

        Each chunk is a request of its own, so a slow reader can't run into the client's timeout.
        """
        for begin in range(start, end, CHUNK_BYTES):
            yield self.read_range(key, begin, min(begin + CHUNK_BYTES, end))

    def download(self, key: str, path: Path) -> int:
        """Copy an object to `path` and return its size. `path` appears complete."""
        size = self.require(key).size
        unfinished = path.with_name(path.name + ".part")
        with unfinished.open("wb") as file:
            for chunk in self.stream(key, 0, size):
                file.write(chunk)
            if file.tell() != size:
                raise Unavailable(
                    f"object storage gave {file.tell()} of {size} bytes of {key}", code="storage_truncated"
                )
        unfinished.replace(path)
        return size

    def head(self, key: str) -> ObjectHead | None:
        try:
            return self.require(key)
        except NotFound:
            return None

    def require(self, key: str) -> ObjectHead:
        """As `head`. Raises NotFound if there is no such object."""
        with translated(check_key(key)):
            meta = obstore.head(self._store, key)
        return ObjectHead(key=key, size=meta["size"], etag=meta["e_tag"])

    def list_folders(self, prefix: str) -> list[str]:
        """The names of the folders directly below the folder `prefix`."""
        with translated(check_key(prefix)):
            listing = obstore.list_with_delimiter(self._store, prefix + "/")
        return sorted(path.rstrip("/").rpartition("/")[2] for path in listing["common_prefixes"])

    def list_folders_like(self, prefix: str, start: str) -> list[str]:
        """The names of the folders below `prefix` that begin with `start`; on S3 without listing all."""
        if not self.can_presign:  # a folder of this host has no order, and its files need not be looked at
            return [name for name in self.list_folders(prefix) if name.startswith(start)]
        with translated(check_key(prefix)):
            names: set[str] = set()
            for page in obstore.list(self._store, prefix, offset=f"{prefix}/{start}"):
                folders = [meta["path"].removeprefix(prefix + "/").partition("/")[0] for meta in page]
                names.update(name for name in folders if name.startswith(start))
                if folders and folders[-1] > start and not folders[-1].startswith(start):
                    break
        return sorted(names)

    def list(self, prefix: str) -> list[ObjectHead]:
        """Every object below the folder `prefix`, by key."""
        with translated(check_key(prefix)):
            metas = obstore.list(self._store, prefix).collect()
        heads = [ObjectHead(key=meta["path"], size=meta["size"], etag=meta["e_tag"]) for meta in metas]
        return sorted(heads, key=lambda head: head.key)

    def delete(self, key: str) -> None:
        """Remove an object; an absent one is no error."""
        with translated(check_key(key)):
            try:
                obstore.delete(self._store, key)
            except FileNotFoundError:
                return

    def delete_prefix(self, prefix: str) -> int:
        """Remove every object below the folder `prefix` and return how many there were."""
        heads = self.list(prefix)
        for head in heads:
            self.delete(head.key)
        return len(heads)

    def presign(self, key: str, *, expires_s: int = PRESIGNED_S) -> str:
        """A URL that reads the object without credentials for a while. S3 only (`can_presign`)."""
        if not isinstance(self._store, S3Store):
            raise Unavailable(f"{self.url} cannot sign URLs", code="presign_unsupported")
        with translated(check_key(key)):
            return obstore.sign(self._store, "GET", key, timedelta(seconds=expires_s))

    def check(self) -> None:
        """Raise Unavailable unless the storage answers."""
        self.head("readiness")
