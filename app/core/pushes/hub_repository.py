"""Writes one commit of files into a model repository on the hub.

The protocol is the one that huggingface_hub 2.4 speaks without xet: `preupload` says of each file whether it
goes into the commit itself or into Git LFS, the LFS batch says which contents are missing and where they go,
and the commit names all of them. So a content is sent once, whatever died in between, and a commit that would
change nothing is not made. As for downloads, all requests are ours: they pass the guard of outgoing requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from app.core.errors import InvalidRequest, Unavailable, field_fault
from app.core.pushes.hub_refusals import check_push, refuse_token
from app.core.records.specs import PushOptions
from app.core.sources.hub_model import limited_body, read_listing

TRIES = 5
PAUSE_S = 0.2  # before the second try; each further pause is twice as long
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
ANSWER_S = 600.0  # a commit of many files, and the end of an upload, take the hub long
SAMPLE_BYTES = 512
BATCH = 256  # files of one question
LFS_JSON = {
    "Accept": "application/vnd.git-lfs+json",
    "Content-Type": "application/vnd.git-lfs+json",
}
# What belongs to a model in safetensors: of an earlier one, loaders would read it along with the new files.
SHARDS = (".safetensors", ".safetensors.index.json")


class PushedFile(Protocol):
    """A file to push."""

    path: str
    size: int
    sha256: str

    def read(self, start: int, end: int) -> bytes:
        """Its bytes from `start` to `end`."""

    def chunks(self, start: int, end: int) -> Iterator[bytes]:
        """The same in chunks; may raise to stop."""


class PushedCommit(NamedTuple):
    commit: str
    url: str  # of the commit, for people


class Mode(BaseModel):
    """What `preupload` says of a file."""

    path: str
    uploadMode: str  # the hub's name: lfs, or regular
    oid: str | None = None  # of the repository's file at this path: SHA-256 in LFS, else Git's SHA-1


class Modes(BaseModel):
    files: tuple[Mode, ...]


class Action(BaseModel):
    href: str
    header: dict[str, Any] = {}


class Missing(BaseModel):
    """One object of an LFS batch; without actions its content is there already."""

    oid: str
    actions: dict[str, Action] | None = None
    error: dict[str, Any] | None = None


class Objects(BaseModel):
    objects: tuple[Missing, ...]


class Committed(BaseModel):
    commitOid: str  # the hub's name
    commitUrl: str


class HubRepository:
    """A repository of the hub, as the holder of the client's token may write it."""

    def __init__(self, options: PushOptions, client: httpx.Client) -> None:
        from huggingface_hub.constants import ENDPOINT

        self.options = options
        self._client = client
        self._endpoint = ENDPOINT
        self._api = f"{ENDPOINT}/api/models/{options.repo_id}"
        self._branch = options.revision or "main"
        self._revision = quote(self._branch, safe="")

    @property
    def url(self) -> str:
        return f"{self._endpoint}/{self.options.repo_id}"

    def check_token(self) -> None:
        """Raises InvalidRequest for a token that the hub does not know, or that may only read."""
        answer = self._send("GET", f"{self._endpoint}/api/whoami-v2")
        if answer.status_code in (400, 401, 403):
            raise refuse_token("the hub does not know it")
        check_push(answer, self.options, "can't be checked")
        access = (answer.json().get("auth") or {}).get("accessToken") or {}
        if access.get("role") == "read":
            raise refuse_token("it may only read")

    def prepare(self) -> None:
        """The repository and its branch exist from here on. Raises InvalidRequest where they may not."""
        owner, _, name = self.options.repo_id.partition("/")
        visibility = "private" if self.options.private else "public"
        self._created(
            f"{self._endpoint}/api/repos/create",
            {"name": name, "organization": owner, "visibility": visibility},
            self._api,
        )
        if self._branch != "main":
            self._created(
                f"{self._api}/branch/{self._revision}", {}, f"{self._api}/revision/{self._revision}"
            )

    def _created(self, url: str, body: dict[str, Any], there: str) -> None:
        answer = self._send("POST", url, json=body)
        if answer.status_code in (401, 403) and self._send("GET", there).is_success:
            return  # it exists: a token of one repository need not be able to create others
        if answer.status_code != httpx.codes.CONFLICT:
            check_push(answer, self.options, "can't be created")

    def push(self, files: Sequence[PushedFile], message: str) -> PushedCommit:
        """Send what is missing and commit it; the branch's last commit if nothing would change."""
        modes = self._modes(files)
        changed = [file for file in files if modes[file.path].oid != oid_of(file, modes[file.path])]
        large = [file for file in changed if modes[file.path].uploadMode == "lfs"]
        for start in range(0, len(large), BATCH):
            self._upload(large[start : start + BATCH])
        head, sizes, _ = read_listing(self._client, self.options.repo_id, self._branch, "model")
        stale = stale_shards(sizes, files)
        if not changed and not stale:
            return PushedCommit(head, f"{self.url}/commit/{head}")
        return self._commit(changed, modes, stale, message)

    def _modes(self, files: Sequence[PushedFile]) -> dict[str, Mode]:
        modes: dict[str, Mode] = {}
        for start in range(0, len(files), BATCH):
            asked = [
                {"path": file.path, "size": file.size, "sample": encoded(file.read(0, SAMPLE_BYTES))}
                for file in files[start : start + BATCH]
            ]
            answer = self._send("POST", f"{self._api}/preupload/{self._revision}", json={"files": asked})
            check_push(answer, self.options, "does not take the files")
            listed = parsed(Modes, answer).files
            # Git LFS has no empty files.
            sizes = {file.path: file.size for file in files}
            modes |= {
                mode.path: mode if sizes.get(mode.path) else mode.model_copy(update={"uploadMode": "regular"})
                for mode in listed
            }
        missing = next((file.path for file in files if file.path not in modes), None)
        if missing is not None:
            raise Unavailable(f"the hub does not say how it takes {missing}", remedy="try again later")
        return modes

    def _upload(self, files: Sequence[PushedFile]) -> None:
        by_digest = {file.sha256: file for file in files}
        asked = {
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "objects": [{"oid": digest, "size": file.size} for digest, file in by_digest.items()],
            "hash_algo": "sha256",
            "ref": {"name": self._branch},
        }
        answer = self._send(
            "POST", f"{self.url}.git/info/lfs/objects/batch", content=json.dumps(asked), headers=LFS_JSON
        )
        check_push(answer, self.options, "takes no large files")
        for item in parsed(Objects, answer).objects:
            if item.error is not None:
                reason = str(item.error.get("message", ""))[:300]
                raise InvalidRequest(
                    f"the hub does not take {by_digest[item.oid].path}: {reason}",
                    code="push_refused",
                    remedy="see what the hub says: size and storage limits are the account's",
                )
            if item.actions is not None and "upload" in item.actions:
                self._upload_one(by_digest[item.oid], item.actions)

    def _upload_one(self, file: PushedFile, actions: dict[str, Action]) -> None:
        upload, verify = actions["upload"], actions.get("verify")
        part_bytes = upload.header.get("chunk_size")
        if part_bytes is None:
            self._put(upload.href, file, 0, file.size)
        else:
            self._put_parts(upload, file, int(part_bytes))
        if verify is not None:
            answer = self._send("POST", verify.href, json={"oid": file.sha256, "size": file.size})
            check_push(answer, self.options, f"does not hold {file.path} after its upload")

    def _put_parts(self, upload: Action, file: PushedFile, part_bytes: int) -> None:
        urls = [upload.header[name] for name in sorted(filter(str.isdigit, upload.header), key=int)]
        if len(urls) != -(-file.size // part_bytes):
            raise Unavailable(
                f"the hub gives {len(urls)} addresses for the parts of {file.path}", remedy="try again later"
            )
        parts = []
        for number, url in enumerate(urls):
            start = number * part_bytes
            answer = self._put(url, file, start, min(start + part_bytes, file.size))
            parts.append({"partNumber": number + 1, "etag": answer.headers.get("ETag", "")})
        body = json.dumps({"oid": file.sha256, "parts": parts})
        answer = self._send("POST", upload.href, content=body, headers=LFS_JSON, is_ours=False)
        check_push(answer, self.options, f"does not put the parts of {file.path} together")

    def _put(self, url: str, file: PushedFile, start: int, end: int) -> httpx.Response:
        # Its address is signed: the token stays with the hub.
        answer = self._send("PUT", url, upload=(file, start, end), is_ours=False)
        check_push(answer, self.options, f"does not take {file.path}")
        return answer

    def _commit(
        self, changed: Sequence[PushedFile], modes: dict[str, Mode], stale: Sequence[str], message: str
    ) -> PushedCommit:
        lines: list[dict[str, Any]] = [
            {"key": "header", "value": {"summary": message, "description": ""}},
            *[{"key": "deletedFile", "value": {"path": path}} for path in stale],
            *[committed_line(file, modes[file.path]) for file in changed],
        ]
        body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        answer = self._send(
            "POST",
            f"{self._api}/commit/{self._revision}",
            content=body,
            headers={"Content-Type": "application/x-ndjson"},
            tries=1,  # whether a lost answer was a commit shows in the next push's questions
        )
        check_push(answer, self.options, "does not take the commit")
        committed = parsed(Committed, answer)
        return PushedCommit(committed.commitOid, committed.commitUrl)

    def _send(
        self,
        method: str,
        url: str,
        *,
        upload: tuple[PushedFile, int, int] | None = None,
        is_ours: bool = True,
        tries: int = TRIES,
        **request: Any,
    ) -> httpx.Response:
        """The answer, after up to `tries` tries. `is_ours`: the hub itself answers, so it gets the token."""
        headers = dict(request.pop("headers", {}))
        if upload is not None:
            headers["Content-Length"] = str(upload[2] - upload[1])
        for left in reversed(range(tries)):
            if upload is not None:
                request["content"] = upload[0].chunks(upload[1], upload[2])
            try:
                answer = self._sent(method, url, headers, is_ours, request)
            except httpx.RequestError as fault:
                if not left:
                    raise Unavailable(
                        f"the hub at {self._endpoint} does not answer: {type(fault).__name__}",
                        remedy="check the network and HF_ENDPOINT; the push goes on by itself",
                    ) from fault
            else:
                if not left or answer.status_code not in PASSING:
                    return answer
            time.sleep(PAUSE_S * 2 ** (tries - 1 - left))
        raise AssertionError("the last try returns or raises")

    def _sent(
        self, method: str, url: str, headers: dict[str, str], is_ours: bool, request: dict[str, Any]
    ) -> httpx.Response:
        built = self._client.build_request(method, url, headers=headers, timeout=ANSWER_S, **request)
        if not is_ours:
            built.headers.pop("Authorization", None)
        answer = self._client.send(built, stream=True, follow_redirects=False)
        try:
            body = limited_body(answer)
        finally:
            answer.close()
        return httpx.Response(answer.status_code, headers=plain_headers(answer), content=body)


def plain_headers(answer: httpx.Response) -> dict[str, str]:
    """The answer's headers without those of its encoding: the body is read."""
    return {
        name: value
        for name, value in answer.headers.items()
        if name not in ("content-encoding", "content-length", "transfer-encoding")
    }


def oid_of(file: PushedFile, mode: Mode) -> str:
    """What the hub names the file's content by."""
    if mode.uploadMode == "lfs":
        return file.sha256
    content = file.read(0, file.size)
    return hashlib.sha1(b"blob %d\0" % file.size + content, usedforsecurity=False).hexdigest()


def committed_line(file: PushedFile, mode: Mode) -> dict[str, Any]:
    if mode.uploadMode == "lfs":
        value: dict[str, Any] = {"algo": "sha256", "oid": file.sha256, "size": file.size}
        return {"key": "lfsFile", "value": {"path": file.path, **value}}
    content = encoded(file.read(0, file.size))
    return {"key": "file", "value": {"content": content, "path": file.path, "encoding": "base64"}}


def stale_shards(there: dict[str, int], files: Sequence[PushedFile]) -> list[str]:
    """Safetensors files of an earlier model at the repository's top, where the new one has some."""
    pushed = {file.path for file in files}
    if not any(path.endswith(SHARDS) for path in pushed):
        return []
    return sorted(path for path in there if path.endswith(SHARDS) and "/" not in path and path not in pushed)


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def parsed(kind: Any, answer: httpx.Response) -> Any:
    try:
        return TypeAdapter(kind).validate_json(answer.content)
    except ValidationError as fault:
        raise Unavailable(
            f"the hub's answer to a push is not understood: {field_fault(fault.errors()[0])}",
            remedy="check HF_ENDPOINT, and that no login page or proxy answers in its place",
        ) from fault
