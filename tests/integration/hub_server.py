"""A small server that speaks the hub's protocol: revisions, file metadata, ranged downloads, commits."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.integration.hub_writing import HubWrites, WrittenHub
from tests.servers import running

API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repository>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?"
)
RESOLVE = re.compile(
    r"/(?:(?P<kind>datasets)/)?(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)
RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class HubServer(WrittenHub, ThreadingHTTPServer):
    """Repositories by kind and id, then by commit; `branches` name commits."""

    daemon_threads = True

    def __init__(self) -> None:
        WrittenHub.__init__(self)
        ThreadingHTTPServer.__init__(self, ("127.0.0.1", 0), HubRequests)
        self.commits: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}
        self.branches: dict[tuple[str, str, str], str] = {}
        self.token: str | None = None
        self.requests: list[str] = []
        self.cuts = 0  # so many of the next file answers break off half way
        self.refusals = 0  # so many of the next file answers are 503
        self.redirect: str | None = None  # where files are said to lie
        self.damaged: str | None = None  # the last byte of this file is changed on its way
        self.answers: dict[str, tuple[int, bytes, dict[str, str]]] = {}  # to paths that hold the key

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def push(
        self, repository: str, files: dict[str, bytes], *, branch: str = "main", kind: str = "models"
    ) -> str:
        """A new commit on a branch; its id."""
        seed = repr((repository, sorted(files.items()), len(self.branches)))
        commit = hashlib.sha1(seed.encode()).hexdigest()
        self.commits.setdefault((kind, repository), {})[commit] = files
        self.branches[kind, repository, branch] = commit
        return commit

    def find(self, kind: str, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.branches.get((kind, repository, revision), revision)
        files = self.commits.get((kind, repository), {}).get(commit)
        return None if files is None else (commit, files)


class HubRequests(HubWrites):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        forced = next((answer for part, answer in self.server.answers.items() if part in path), None)
        if forced is not None:
            self.answer(*forced)
        elif self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path == "/api/whoami-v2":
            self.who()
        elif path == "/api/models":
            self.answer_search()
        elif match := API.fullmatch(path):
            self.answer_api(match)
        elif match := RESOLVE.fullmatch(path):
            self.answer_file(match)
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer_search(self) -> None:
        """As the hub: repositories with the text in their ids, those with the most downloads first."""
        query = dict(parse_qsl(urlsplit(self.path).query))
        assert (query["sort"], query["direction"]) == ("downloads", "-1")
        named = [name for kind, name in self.server.commits if kind == "models" and query["search"] in name]
        entries = [{"id": name, "downloads": 10 * len(name), "private": False} for name in named]
        entries.sort(key=lambda entry: -int(str(entry["downloads"])))
        self.answer(200, json.dumps(entries[: int(query["limit"])]).encode(), {})

    def answer_api(self, match: re.Match[str]) -> None:
        found = self.server.find(match["kind"], match["repository"], match["revision"] or "main")
        if found is None:
            known = (match["kind"], match["repository"]) in self.server.commits
            code = "RevisionNotFound" if known else "RepoNotFound"
            self.answer(404, b"{}", {"X-Error-Code": code})
            return
        commit, files = found
        siblings = [self.sibling(name, content) for name, content in files.items()]
        card = self.server.cards.get(match["repository"], {})
        body = {"id": match["repository"], "sha": commit, "siblings": siblings, "cardData": card}
        self.answer(200, json.dumps(body).encode(), {})

    def sibling(self, name: str, content: bytes) -> dict[str, object]:
        sibling: dict[str, object] = {"rfilename": name, "size": len(content)}
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()
            sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
        return sibling

    def answer_file(self, match: re.Match[str]) -> None:
        found = self.server.find(match["kind"] or "models", match["repository"], match["revision"])
        if found is None or match["path"] not in found[1]:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if self.server.redirect is not None:
            self.answer(302, b"", {"Location": self.server.redirect})
            return
        if self.server.refusals:
            self.server.refusals -= 1
            self.answer(503, b"", {})
            return
        commit, files = found
        content = files[match["path"]]
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.server.damaged == match["path"]:
            content = content[:-1] + bytes([content[-1] ^ 1])
        wanted = RANGE.fullmatch(self.headers.get("Range", ""))
        if wanted is None:
            self.answer(200, content, headers)
            return
        start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(content))
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self.answer(206, content[start:end], headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if status == 206 and len(body) > 1 and self.server.cuts:
            self.server.cuts -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the tests read `requests`."""


@contextmanager
def hub_server() -> Iterator[HubServer]:
    with running(HubServer()) as server:
        yield server
