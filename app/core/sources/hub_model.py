"""A model repository on the hub, read at one pinned commit.

Addresses and credentials come from huggingface_hub (HF_ENDPOINT, HF_TOKEN). All requests are ours: they pass
the guard of outgoing requests, and a download can be stopped between chunks and resumed where it was cut.
"""

from __future__ import annotations

import hashlib
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import httpx
from pydantic import BaseModel, Field, SecretStr, ValidationError

from app.core.errors import ModelRefused, Unavailable, field_fault, field_path
from app.core.outgoing.address_guard import IpNetwork, OutgoingGuard, guarded_client, origin_of
from app.core.sources.hub_answers import Asked, check_answer

TRIES = 5
MAX_REDIRECTS = 5
MAX_LISTING_BYTES = 32 * 1024**2
RepoKind = Literal["model", "dataset"]
NO_WAY = (
    "check that the service's host reaches the hub (network, DNS; the environment's proxies are not used), "
    "set HF_ENDPOINT to a mirror that it reaches, or give a local folder: ./my-model or file:///…"
)


class HubModel:
    """The files of one commit. A branch or tag is resolved when the object is made, once."""

    def __init__(
        self,
        repository: str,
        revision: str | None = None,
        *,
        kind: RepoKind = "model",
        networks: Sequence[IpNetwork] = (),
        token: SecretStr | None = None,
    ) -> None:
        self.repository = repository
        self.kind = kind
        refuse_offline(repository)
        self._client = hub_client(networks, token)
        weakref.finalize(self, self._client.close)
        self.commit, self._sizes, self._sha256 = read_listing(self._client, repository, revision, kind)
        self.name = f"hf:{repository}@{self.commit}"

    def list(self) -> dict[str, int]:
        return dict(self._sizes)

    def read(self, path: str, start: int, length: int) -> bytes:
        end = min(start + length, self._sizes.get(path, 0))
        if end <= start:
            return b""
        body = b"".join(self.chunks(path, start, end))
        if len(body) != end - start:
            raise Unavailable(f"{self.name}: {path} ended after {len(body)} of {end - start} bytes")
        return body

    def download(self, path: str, dest: Path, on_bytes: Callable[[int], None]) -> None:
        """Copy a file, checked against the size and the SHA-256 that the hub states."""
        size, digest = self._sizes[path], hashlib.sha256()
        with dest.open("wb") as target:
            for chunk in self.chunks(path, 0, size):
                target.write(chunk)
                digest.update(chunk)
                on_bytes(len(chunk))
        stated = self._sha256.get(path)
        if dest.stat().st_size != size or (stated is not None and stated != digest.hexdigest()):
            raise Unavailable(
                f"{self.name}: {path} came with {dest.stat().st_size} bytes, sha256 {digest.hexdigest()}; "
                f"the hub states {size} bytes, sha256 {stated}",
                remedy="try again: the download was damaged on its way",
            )

    def content_key(self) -> str:
        return hashlib.sha256(f"{self.kind}\0{self.repository}\0{self.commit}".encode()).hexdigest()

    def chunks(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end`; a broken connection is resumed."""
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.repository, path, revision=self.commit, repo_type=self.kind)
        position, tries = start, 0
        while position < end:
            before = position
            fault: Exception | None = None
            try:
                for chunk in self.stream(url, position, end):
                    position += len(chunk)
                    yield chunk
            except (httpx.RequestError, Retryable) as cut:
                fault = cut
            tries = 0 if position > before else tries + 1
            if tries == TRIES:
                raise Unavailable(
                    f"{url} ends at byte {position} of {end}: {fault}", remedy=NO_WAY
                ) from fault
            if position < end:
                time.sleep(0.2 * 2**tries)

    def stream(self, url: str, start: int, end: int) -> Iterator[bytes]:
        with self._client.stream("GET", url, headers=range_headers(start, end)) as response:
            if response.status_code in {429, 500, 502, 503, 504}:
                raise Retryable(f"status {response.status_code}")
            check_answer(response, asked_of(self._client, self.repository, self.commit, self.kind))
            commit = response.headers.get("X-Repo-Commit")
            if commit is not None and commit != self.commit:
                raise Unavailable(f"{url} answers for commit {commit}, not {self.commit}")
            # A server without ranges sends the whole file: drop what was not asked for.
            skip = start if response.status_code == 200 else 0
            left = end - start
            # As they come: chunks of a fixed size would lose the last one of a cut connection.
            for chunk in response.iter_bytes():
                content = chunk[skip : skip + left]
                skip = max(0, skip - len(chunk))
                left -= len(content)
                if content:
                    yield content
                if not left:
                    return


class Retryable(Exception):
    """The hub asks to try again."""


def range_headers(start: int, end: int) -> dict[str, str]:
    # Without "identity" a proxy may compress, and then ranges count compressed bytes.
    return {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}


class Lfs(BaseModel):
    sha256: str | None = None


class Sibling(BaseModel):
    rfilename: str
    size: int | None = None
    lfs: Lfs | None = None


class Listing(BaseModel):
    """The fields we use of the hub's description of a repository at a revision."""

    sha: str = Field(pattern=r"^[0-9a-f]{40}$")
    siblings: tuple[Sibling, ...] = ()


def hub_client(networks: Sequence[IpNetwork], token: SecretStr | None = None) -> httpx.Client:
    """A client of the hub that acts with `token`, by default with the one of this host's environment."""
    # Imported here: the library costs a quarter second, and most jobs' models are no hub models.
    from huggingface_hub.constants import ENDPOINT

    # Not the library's own headers: to write them it asks the hub for a list of agents, past the guard.
    secret = own_token() if token is None else token.get_secret_value()
    headers = {"User-Agent": "nibble", **({} if secret is None else {"Authorization": f"Bearer {secret}"})}
    # The endpoint is the operator's choice. Its redirects are not: each hop passes the guard.
    guard = OutgoingGuard(networks, trusted=[origin_of(httpx.URL(ENDPOINT))])
    return guarded_client(
        guard, headers=headers, timeout=30, follow_redirects=True, max_redirects=MAX_REDIRECTS
    )


def own_token() -> str | None:
    """The token in HF_TOKEN, or of a login on this host; None if there is none, or it may not be used."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_DISABLE_IMPLICIT_TOKEN

    return None if HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()


def read_listing(
    client: httpx.Client, repository: str, revision: str | None, kind: RepoKind
) -> tuple[str, dict[str, int], dict[str, str]]:
    """The commit behind a revision, its files' sizes, and the SHA-256 of those that state one."""
    from huggingface_hub.constants import ENDPOINT

    quoted = quote(revision or "main", safe="")
    url = f"{ENDPOINT}/api/{kind}s/{repository}/revision/{quoted}?blobs=true"
    try:
        with client.stream("GET", url) as answer:
            body = limited_body(answer)
    except (httpx.HTTPError, httpx.InvalidURL) as fault:
        raise Unavailable(
            f"the hub at {ENDPOINT} does not answer for {repository}: {fault}",
            remedy=NO_WAY,
        ) from fault
    check_answer(answer, asked_of(client, repository, revision, kind))
    try:
        listing = Listing.model_validate_json(body)
    except ValidationError as fault:
        first = fault.errors()[0]
        kind_of_body = answer.headers.get("Content-Type", "").partition(";")[0] or "no type"
        raise Unavailable(
            f"{ENDPOINT} does not answer for {repository} as a hub does ({kind_of_body}): "
            f"{field_path(first['loc'])}: {field_fault(first)}".replace(": : ", ": "),
            remedy="check HF_ENDPOINT, and that no login page or proxy answers in its place",
        ) from fault
    sizes = {entry.rfilename: entry.size for entry in listing.siblings if entry.size is not None}
    stated = {entry.rfilename: entry.lfs.sha256 for entry in listing.siblings if entry.lfs is not None}
    return listing.sha, sizes, {path: digest for path, digest in stated.items() if digest is not None}


def limited_body(answer: httpx.Response) -> bytes:
    body = bytearray()
    for chunk in answer.iter_bytes():
        body += chunk
        if len(body) > MAX_LISTING_BYTES:
            raise Unavailable(f"the hub's answer is larger than {MAX_LISTING_BYTES} bytes")
    return bytes(body)


def asked_of(client: httpx.Client, repository: str, revision: str | None, kind: RepoKind) -> Asked:
    from huggingface_hub.constants import ENDPOINT

    folder = "" if kind == "model" else f"{kind}s/"
    return Asked(
        name=f"hf:{repository}@{revision or 'main'}",
        page=f"{ENDPOINT}/{folder}{repository}",
        has_token="authorization" in client.headers,
    )


def refuse_offline(repository: str) -> None:
    """Raises ModelRefused where the operator has forbidden the hub, as huggingface_hub understands it."""
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise ModelRefused(
            f"hf:{repository} is not read: HF_HUB_OFFLINE forbids the hub",
            code="hub_offline",
            remedy="give a folder (file:///…), or let the operator unset HF_HUB_OFFLINE",
            param="model",
        )
