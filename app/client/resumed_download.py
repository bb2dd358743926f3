"""Files of an artifact: continued where they broke off, visible only after their SHA-256 was checked."""

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

PIECE_BYTES = 256 * 1024
BREAKS = 8  # in a row, with not a byte between them

OnBytes = Callable[[int], None]  # hears of bytes that were received; negative: of bytes that were discarded


def ignore_bytes(count: int) -> None:
    """For callers who show no progress."""


def artifact_files(
    exchange: Exchange, artifact: ArtifactAnswer, folder: Path, on_bytes: OnBytes
) -> Flow[None]:
    """Every file under `folder`. Those that are there already and whole are not sent again."""
    places = [(file, folder / safe_path(file.path)) for file in artifact.files]
    for file, place in places:
        if (yield RunTask(partial(is_whole, place, file))):
            on_bytes(file.size)
        else:
            yield from one_file(exchange, artifact.id, file, place, on_bytes)


def one_file(
    exchange: Exchange, artifact_id: str, file: FileAnswer, place: Path, on_bytes: OnBytes
) -> Flow[None]:
    """A file, continued from the part that an earlier download left; once more from its start if wrong."""
    part: Part = yield RunTask(partial(Part, place, on_bytes))
    try:
        was_continued = part.size > 0
        yield from received(exchange, artifact_id, file, part)
        if was_continued and part.sha256 != file.sha256:
            yield RunTask(part.restart)
            yield from received(exchange, artifact_id, file, part)
        if part.sha256 != file.sha256:
            part.discard()
            raise DownloadCorrupt(
                f"{file.path}: received SHA-256 {part.sha256}, expected {file.sha256}",
                remedy="download it again; if it happens twice, the stored file is damaged",
            )
        yield RunTask(part.publish)
    finally:
        part.close()


def received(exchange: Exchange, artifact_id: str, file: FileAnswer, part: Part) -> Flow[None]:
    """Fills `part` with what it lacks, over as many connections as it takes."""
    breaks = 0
    while part.size < file.size or file.size == 0:
        before = part.size
        call = Call("GET", file_route(artifact_id, file.path), headers=range_header(part.size))
        answer = yield from exchange.opened(Open(call, PIECE_BYTES))
        if part.size and answer.status_code != httpx.codes.PARTIAL_CONTENT:
            yield RunTask(part.restart)  # the whole file comes
            before = 0
        try:
            while (piece := (yield Read())) is not None:
                yield RunTask(partial(part.write, piece))
        except httpx.TransportError as fault:
            breaks = breaks + 1 if part.size == before else 1
            if breaks >= BREAKS:
                raise unreachable(exchange.url, fault) from fault
            yield Pause(exchange.retries.pause_s(breaks, None))
        else:
            return


def range_header(size: int) -> dict[str, str]:
    # No If-Range: files of an artifact never change, and storage that answers in our place has other tags.
    wanted = {"Range": f"bytes={size}-"} if size else {}
    return {"Accept-Encoding": "identity", **wanted}


class Part:
    """What has come of a file: beside its place, with the digest of what it holds."""

    def __init__(self, place: Path, on_bytes: OnBytes) -> None:
        self.place = place
        self.path = place.with_name(place.name + ".partial")
        self.on_bytes = on_bytes
        self.digest = hashlib.sha256()
        self.size = 0
        self._file: IO[bytes] | None = None
        if self.path.is_file():
            with self.path.open("rb") as kept:
                while piece := kept.read(1 << 20):
                    self.note(piece)

    @property
    def sha256(self) -> str:
        return self.digest.hexdigest()

    def note(self, piece: bytes) -> None:
        self.digest.update(piece)
        self.size += len(piece)
        self.on_bytes(len(piece))

    def write(self, piece: bytes) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        self._file.write(piece)
        self.note(piece)

    def restart(self) -> None:
        """Forget what has come."""
        self.discard()
        self.on_bytes(-self.size)
        self.digest, self.size = hashlib.sha256(), 0

    def discard(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def publish(self) -> None:
        """The file appears, whole."""
        if self.size == 0:
            self.write(b"")
        self.close()
        self.path.replace(self.place)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def is_whole(place: Path, file: FileAnswer) -> bool:
    return place.is_file() and place.stat().st_size == file.size and file_sha256(place) == file.sha256


def safe_path(path: str) -> PurePosixPath:
    """A file's path as the service names it, refused if it would leave the download folder."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise DownloadCorrupt(
            f"the service names a file {path!r}, which lies outside the download folder",
            remedy="don't trust this service",
        )
    return parts
