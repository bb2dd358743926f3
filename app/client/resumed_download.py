"""Downloads an artifact's files: resumed after a break, visible only once their SHA-256 is verified."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

import httpx

from app.client.effects import Call, Flow, Open, Pause, Read, RunTask
from app.client.errors import DownloadCorrupt, unreachable
from app.client.exchange import Exchange
from app.client.paths import file_route
from app.client.views import ArtifactAnswer, FileAnswer
from app.core.sources.file_digest import file_sha256

CHUNK_BYTES = 256 * 1024
BREAKS = 8  # breaks in a row without a byte received

OnBytes = Callable[[int], None]  # called with the bytes received; negative: discarded


def ignore_bytes(count: int) -> None:
    """The default `on_bytes`: does nothing."""


def artifact_files(
    exchange: Exchange, artifact: ArtifactAnswer, folder: Path, on_bytes: OnBytes
) -> Flow[None]:
    """Download every file to `folder`; complete files are skipped."""
    targets = [(file, folder / safe_path(file.path)) for file in artifact.files]
    for file, target in targets:
        if (yield RunTask(partial(is_whole, target, file))):
            on_bytes(file.size)
        else:
            yield from one_file(exchange, artifact.id, file, target, on_bytes)


def one_file(
    exchange: Exchange, artifact_id: str, file: FileAnswer, target: Path, on_bytes: OnBytes
) -> Flow[None]:
    """Download a file, resuming an earlier download; if its digest is wrong, once more from the start."""
    partial_file: PartialFile = yield RunTask(partial(PartialFile, target, on_bytes))
    try:
        was_continued = partial_file.size > 0
        yield from received(exchange, artifact_id, file, partial_file)
        if was_continued and partial_file.sha256 != file.sha256:
            yield RunTask(partial_file.restart)
            yield from received(exchange, artifact_id, file, partial_file)
        if partial_file.sha256 != file.sha256:
            partial_file.discard()
            raise DownloadCorrupt(
                f"{file.path}: received SHA-256 {partial_file.sha256}, expected {file.sha256}",
                remedy="download it again; if it happens twice, the stored file is damaged",
            )
        yield RunTask(partial_file.publish)
    finally:
        partial_file.close()


def received(exchange: Exchange, artifact_id: str, file: FileAnswer, partial_file: PartialFile) -> Flow[None]:
    """Receive the missing bytes of `partial_file`, reconnecting as often as needed."""
    breaks = 0
    while partial_file.size < file.size or file.size == 0:
        before = partial_file.size
        call = Call("GET", file_route(artifact_id, file.path), headers=range_header(partial_file.size))
        answer = yield from exchange.opened(Open(call, CHUNK_BYTES))
        if partial_file.size and answer.status_code != httpx.codes.PARTIAL_CONTENT:
            yield RunTask(partial_file.restart)  # the server sends the whole file
            before = 0
        try:
            while (chunk := (yield Read())) is not None:
                yield RunTask(partial(partial_file.write, chunk))
        except httpx.TransportError as fault:
            breaks = breaks + 1 if partial_file.size == before else 1
            if breaks >= BREAKS:
                raise unreachable(exchange.url, fault) from fault
            yield Pause(exchange.retries.pause_s(breaks, None))
        else:
            return


def range_header(size: int) -> dict[str, str]:
    # No If-Range: files of an artifact never change, and object storage has tags of its own.
    byte_range = {"Range": f"bytes={size}-"} if size else {}
    return {"Accept-Encoding": "identity", **byte_range}


class PartialFile:
    """The bytes received of a file, stored beside its target, with their running digest."""

    def __init__(self, target: Path, on_bytes: OnBytes) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".partial")
        self.on_bytes = on_bytes
        self.digest = hashlib.sha256()
        self.size = 0
        self._file: IO[bytes] | None = None
        if self.path.is_file():
            with self.path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    self.note(chunk)

    @property
    def sha256(self) -> str:
        return self.digest.hexdigest()

    def note(self, chunk: bytes) -> None:
        self.digest.update(chunk)
        self.size += len(chunk)
        self.on_bytes(len(chunk))

    def write(self, chunk: bytes) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        self._file.write(chunk)
        self.note(chunk)

    def restart(self) -> None:
        """Discard the received bytes."""
        self.discard()
        self.on_bytes(-self.size)
        self.digest, self.size = hashlib.sha256(), 0

    def discard(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def publish(self) -> None:
        """Move the complete file to its target."""
        if self.size == 0:
            self.write(b"")
        self.close()
        self.path.replace(self.target)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def is_whole(target: Path, file: FileAnswer) -> bool:
    return target.is_file() and target.stat().st_size == file.size and file_sha256(target) == file.sha256


def safe_path(path: str) -> PurePosixPath:
    """The file's path; refused if it would leave the download folder."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise DownloadCorrupt(
            f"the service names a file {path!r}, which lies outside the download folder",
            remedy="don't trust this service",
        )
    return parts
