"""A model repository on the hub, read at one pinned commit.

Metadata comes through huggingface_hub (HF_ENDPOINT and HF_TOKEN are honoured there); ranges and downloads
are plain HTTP, so that a download can be stopped between pieces and goes on where a cut connection left it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import httpx

from app.core.errors import ModelRefused, NibbleError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

TRIES = 5
RepoKind = Literal["model", "dataset"]


class HubModel:
    """The files of one commit. A branch or tag is resolved when the object is made, once."""

    def __init__(self, repository: str, revision: str | None = None, *, kind: RepoKind = "model") -> None:
        # Imported here: the client costs a quarter second, and most jobs' models are no hub models.
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        self.repository = repository
        self.kind = kind
        self.commit, self._sizes, self._sha256 = read_listing(repository, revision, kind)
        self.name = f"hf:{repository}@{self.commit}"
        self._client = httpx.Client(headers=build_hf_headers(), follow_redirects=True, timeout=30)

    def list(self) -> dict[str, int]:
        return dict(self._sizes)

    def read(self, path: str, start: int, length: int) -> bytes:
        end = min(start + length, self._sizes.get(path, 0))
        if end <= start:
            return b""
        body = b"".join(self.pieces(path, start, end))
        if len(body) != end - start:
            raise Unavailable(f"{self.name}: {path} ended after {len(body)} of {end - start} bytes")
        return body

    def download(self, path: str, dest: Path, on_bytes: Callable[[int], None]) -> None:
        """Copy a file, checked against the size and the SHA-256 that the hub states."""
        size, digest = self._sizes[path], hashlib.sha256()
        with dest.open("wb") as target:
            for piece in self.pieces(path, 0, size):
                target.write(piece)
                digest.update(piece)
                on_bytes(len(piece))
        stated = self._sha256.get(path)
        if dest.stat().st_size != size or (stated is not None and stated != digest.hexdigest()):
            raise Unavailable(
                f"{self.name}: {path} came with {dest.stat().st_size} bytes, sha256 {digest.hexdigest()}; "
                f"the hub states {size} bytes, sha256 {stated}",
                remedy="try again: the download was damaged on its way",
            )

    def content_key(self) -> str:
        return hashlib.sha256(f"{self.kind}\0{self.repository}\0{self.commit}".encode()).hexdigest()

    def known_sha256(self, path: str) -> str | None:
        return self._sha256.get(path)

    def pieces(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end`; a cut connection is taken up again where it broke."""
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.repository, path, revision=self.commit, repo_type=self.kind)
        position, tries = start, 0
        while position < end:
            before = position
            fault: Exception | None = None
            try:
                for piece in self.stream(url, position, end):
                    position += len(piece)
                    yield piece
            except (httpx.TransportError, Retryable) as cut:
                fault = cut
            tries = 0 if position > before else tries + 1
            if tries == TRIES:
                raise Unavailable(
                    f"{url} ends at byte {position} of {end}: {fault}", remedy="try again later"
                ) from fault
            if position < end:
                time.sleep(0.2 * 2**tries)

    def stream(self, url: str, start: int, end: int) -> Iterator[bytes]:
        with self._client.stream("GET", url, headers=range_headers(start, end)) as response:
            if response.status_code in {429, 500, 502, 503, 504}:
                raise Retryable(f"status {response.status_code}")
            if response.status_code not in {200, 206}:
                raise refuse_access(self.repository, self.commit, f"{url} answers {response.status_code}")
            commit = response.headers.get("X-Repo-Commit")
            if commit is not None and commit != self.commit:
                raise Unavailable(f"{url} answers for commit {commit}, not {self.commit}")
            # A server without ranges sends the whole file: drop what was not asked for.
            skip = start if response.status_code == 200 else 0
            left = end - start
            # As they come: pieces of a fixed size would lose the last one of a cut connection.
            for piece in response.iter_bytes():
                wanted = piece[skip : skip + left]
                skip = max(0, skip - len(piece))
                left -= len(wanted)
                if wanted:
                    yield wanted
                if not left:
                    return


class Retryable(Exception):
    """The hub asks to try again."""


def range_headers(start: int, end: int) -> dict[str, str]:
    # Without "identity" a proxy may compress, and then ranges count compressed bytes.
    return {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}


def read_listing(
    repository: str, revision: str | None, kind: RepoKind
) -> tuple[str, dict[str, int], dict[str, str]]:
    """The commit behind a revision, its files' sizes, and the SHA-256 of those that state one."""
    from huggingface_hub import HfApi

    with hub_access(repository, revision):
        read = HfApi().model_info if kind == "model" else HfApi().dataset_info
        listing = read(repository, revision=revision or "main", files_metadata=True, timeout=30)
    commit = listing.sha or ""
    if len(commit) != 40 or set(commit) - set("0123456789abcdef"):
        raise Unavailable(f"the hub states no commit for {repository}@{revision or 'main'}: {commit!r}")
    siblings = listing.siblings or []
    sizes = {entry.rfilename: entry.size for entry in siblings if entry.size is not None}
    sha256 = {entry.rfilename: entry.lfs.sha256 for entry in siblings if entry.lfs is not None}
    return commit, sizes, sha256


@contextmanager
def hub_access(repository: str, revision: str | None) -> Iterator[None]:
    """Turns the hub's faults into ours."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Its base is the HTTP client's own error class, whose name depends on the hub library's version.
    transport_error = cast("type[Exception]", HfHubHTTPError.__bases__[0])
    try:
        yield
    except NibbleError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as fault:
        raise refuse_access(repository, revision, "not found, private or gated") from fault
    except (HfHubHTTPError, transport_error, OSError) as fault:
        raise Unavailable(
            f"the hub does not answer for {repository}: {fault}", remedy="try again later"
        ) from fault


def refuse_access(repository: str, revision: str | None, why: str) -> ModelRefused:
    return ModelRefused(
        f"hf:{repository}@{revision or 'main'} cannot be read: {why}",
        code="model_not_found",
        remedy="check id and revision; for a private or gated model the operator sets HF_TOKEN",
        param="model",
    )
