"""The writing half of the hub's protocol, as huggingface_hub 2.4 speaks it without xet."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

WRITE = re.compile(
    r"/api/models/(?P<repository>[^/]+/[^/]+)/(?P<what>preupload|commit|branch)/(?P<revision>[^/]+)"
)
BATCH = re.compile(r"/(?P<repository>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
OBJECT = re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})(?:/(?P<what>[a-z]+|\d+))?")
LARGE = (".safetensors", ".gguf")


class WrittenHub:
    """What was written, and how writing fails."""

    def __init__(self) -> None:
        self.writers: dict[str, str] = {}  # token -> role; without any, everyone may write
        self.objects: dict[str, bytes] = {}  # Git LFS, by SHA-256
        self.parts: dict[str, dict[int, bytes]] = {}  # of unfinished uploads
        self.part_bytes: int | None = None  # larger objects come in parts
        self.sent: list[str] = []  # path of each upload that arrived whole
        self.private: dict[str, bool] = {}
        self.deny: dict[str, tuple[int, str]] = {}  # path that holds the key -> status, the hub's words
        self.cut_uploads = 0  # so many of the next uploads break off
        self.halted: threading.Event | None = None  # uploads of `halt_at` wait for it
        self.halt_at = ""  # the beginning of an object's digest
        self.cards: dict[str, dict[str, Any]] = {}  # front matter by repository


class HubWrites(BaseHTTPRequestHandler):
    server: Any

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.refused(path):
            return
        if path == "/api/repos/create":
            self.create_repository(json.loads(body))
        elif path == "/api/validate-yaml":
            self.say({"warnings": [], "errors": []})
        elif match := WRITE.fullmatch(path):
            getattr(self, match["what"])(match["repository"], match["revision"], body)
        elif match := BATCH.fullmatch(path):
            self.batch(json.loads(body))
        elif match := OBJECT.fullmatch(path):
            self.finish_object(match["oid"], match["what"])
        else:
            self.say({"error": "not found"}, 404)

    def do_PUT(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"PUT {path}")
        match = OBJECT.fullmatch(path)
        assert match is not None, path
        assert "Authorization" not in self.headers, "the token goes to the hub alone"
        if self.server.halted is not None and match["oid"].startswith(self.server.halt_at):
            self.server.halted.wait(60)
        length = int(self.headers["Content-Length"])
        if self.server.cut_uploads:
            self.server.cut_uploads -= 1
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        content = self.rfile.read(length)
        if len(content) < length:  # its sender died
            self.close_connection = True
            return
        self.take_upload(path, match, content)

    def take_upload(self, path: str, match: re.Match[str], content: bytes) -> None:
        if match["what"] is None:
            if hashlib.sha256(content).hexdigest() != match["oid"]:
                self.say({"error": "the content is not the object's"}, 400)
                return
            self.server.objects[match["oid"]] = content
        else:
            self.server.parts.setdefault(match["oid"], {})[int(match["what"])] = content
        self.server.sent.append(path)
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def refused(self, path: str) -> bool:
        """Whether the request was answered with a refusal."""
        denied = next((answer for part, answer in self.server.deny.items() if part in path), None)
        if denied is not None:
            self.say({"error": denied[1]}, denied[0])
            return True
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path.startswith("/lfs/") and path.endswith("/complete"):
            assert not token, "the token goes to the hub alone"
            return False
        if self.server.writers and self.server.writers.get(token) != "write":
            self.say({"error": "You don't have the rights"}, 403 if token in self.server.writers else 401)
            return True
        return False

    def who(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        role = self.server.writers.get(token) if self.server.writers else "write"
        if role is None:
            self.say({"error": "Invalid credentials in Authorization header"}, 401)
        else:
            self.say({"name": "someone", "auth": {"accessToken": {"role": role}}})

    def create_repository(self, body: dict[str, Any]) -> None:
        repository = f"{body['organization']}/{body['name']}"
        if ("models", repository) in self.server.commits:
            self.say({"error": "You already created this model repo"}, 409)
            return
        self.server.private[repository] = body["visibility"] == "private"
        self.server.push(repository, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.say({"url": f"{self.server.url}/{repository}"})

    def branch(self, repository: str, revision: str, body: bytes) -> None:
        if ("models", repository, revision) in self.server.branches:
            self.say({"error": "Reference already exists"}, 409)
            return
        self.server.branches["models", repository, revision] = self.server.branches[
            "models", repository, "main"
        ]
        self.say({})

    def preupload(self, repository: str, revision: str, body: bytes) -> None:
        files = self.files_of(repository, revision)
        if files is None:
            return
        answers = []
        for asked in json.loads(body)["files"]:
            is_large = asked["path"].endswith(LARGE)
            content = files.get(asked["path"])
            oid = None if content is None else sha256(content) if is_large else git_sha1(content)
            mode = "lfs" if is_large else "regular"
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.say({"files": answers})

    def batch(self, body: dict[str, Any]) -> None:
        objects = []
        for asked in body["objects"]:
            known = asked["oid"] in self.server.objects
            objects.append(asked if known else {**asked, "actions": self.actions(asked)})
        self.say({"transfer": "basic", "objects": objects})

    def actions(self, asked: dict[str, Any]) -> dict[str, Any]:
        href, part = f"{self.server.url}/lfs/{asked['oid']}", self.server.part_bytes
        verify = {"href": f"{href}/verify"}
        if part is None or asked["size"] <= part:
            return {"upload": {"href": href}, "verify": verify}
        numbers = range(1, -(-asked["size"] // part) + 1)
        header = {"chunk_size": str(part), **{str(number): f"{href}/{number}" for number in numbers}}
        return {"upload": {"href": f"{href}/complete", "header": header}, "verify": verify}

    def finish_object(self, oid: str, what: str) -> None:
        if what == "complete":
            parts = self.server.parts.pop(oid)
            self.server.objects[oid] = b"".join(parts[number] for number in sorted(parts))
        content = self.server.objects.get(oid, b"")
        self.say({}, 200 if sha256(content) == oid else 400)

    def commit(self, repository: str, revision: str, body: bytes) -> None:
        before = self.files_of(repository, revision)
        if before is None:
            return
        files = dict(before)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        assert files != before, "a commit that changes nothing"
        commit = self.server.push(repository, files, branch=revision)
        url = f"{self.server.url}/{repository}/commit/{commit}"
        self.say({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def files_of(self, repository: str, revision: str) -> dict[str, bytes] | None:
        found = self.server.find("models", repository, revision)
        if found is None:
            self.say({"error": "Repository not found"}, 404)
            return None
        files: dict[str, bytes] = found[1]
        return files

    def say(self, body: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
