"""A typed client of Nibble's HTTP API, used by the terminal.

Answers are read leniently: fields that a newer service adds are ignored.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Generic, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.chat_stream import Chunk, OnWait, chat_chunks
from app.core.errors import NibbleError
from app.core.job import TERMINAL, Problem, Progress

LONG_POLL_S = 20
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
RETRY_S = 1.0
RECONNECT_S = 30.0  # how long `follow` puts up with a service that restarts


class ServiceUnreachable(NibbleError):
    code = "service_unreachable"


class ServiceRefused(NibbleError):
    """The service answered with a problem. `code` and `remedy` are the service's."""

    status = 0


class DownloadCorrupt(NibbleError):
    code = "download_corrupt"


class Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class JobView(Answer):
    id: str
    state: str
    stage: str | None = None
    progress: Progress = Progress()
    attempt: int = 0
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    spec: dict[str, Any] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    error: Problem | None = None
    artifacts: tuple[str, ...] = ()
    retry_of: str | None = None

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL


class FileView(Answer):
    path: str
    size: int
    sha256: str


class ArtifactView(Answer):
    id: str
    job: str
    created_at: datetime
    model: str
    format: str
    recipe: dict[str, Any] = Field(default_factory=dict)
    summary: dict[str, Any] = Field(default_factory=dict)
    files: tuple[FileView, ...] = ()

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


class ServerView(Answer):
    slot: int
    worker: str
    engine: str
    state: str
    running: int = 0
    waiting: int = 0
    restarts: int = 0


class DeploymentView(Answer):
    id: str
    name: str
    artifact: str
    engine: str
    state: str
    reason: str = ""
    error: Problem | None = None
    idle_timeout_s: int | None = None
    replicas: int = 1
    servers: tuple[ServerView, ...] = ()
    created_at: datetime


class EventView(Answer):
    id: str
    kind: str
    at: datetime | None = None
    payload: dict[str, Any] = Field(default_factory=dict)


ItemT = TypeVar("ItemT")


class Page(Answer, Generic[ItemT]):
    """A part of a list; `next` is the cursor of the part after it."""

    items: tuple[ItemT, ...] = Field(alias="data")
    has_more: bool = False
    next: str | None = None


class JobPage(Page[JobView]):
    """Jobs, newest first."""


class ArtifactPage(Page[ArtifactView]):
    """Artifacts, newest first."""


class DeploymentPage(Page[DeploymentView]):
    """Deployments, newest first."""


class EventPage(Page[EventView]):
    """Events, oldest first."""


AnswerT = TypeVar("AnswerT", bound=Answer)


class NibbleClient:
    """One connection to a service. Use it as a context manager."""

    def __init__(
        self, url: str, *, api_key: str | None = None, transport: httpx.BaseTransport | None = None
    ) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(30.0, connect=5.0),
            transport=transport,
            # A proxy from the environment must not see the key of a service on this machine.
            trust_env=not is_loopback(self.url),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()

    def submit(self, body: Mapping[str, Any], *, idempotency_key: str | None = None) -> JobView:
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return self.read(JobView, "POST", "/v1/jobs", json=dict(body), headers=headers)

    def job(self, job_id: str) -> JobView:
        return self.read(JobView, "GET", f"/v1/jobs/{segment(job_id)}")

    def jobs(
        self, *, state: str | None = None, label: str | None = None, limit: int = 20, after: str | None = None
    ) -> JobPage:
        params = {"state": state, "label": label, "limit": limit, "after": after}
        return self.read(JobPage, "GET", "/v1/jobs", params=given(params))

    def cancel(self, job_id: str) -> JobView:
        return self.read(JobView, "POST", f"/v1/jobs/{segment(job_id)}/cancel")

    def events(self, job_id: str, *, after: str | None = None, limit: int = 100) -> EventPage:
        params = given({"after": after, "limit": limit})
        return self.read(EventPage, "GET", f"/v1/jobs/{segment(job_id)}/events", params=params)

    def report(self, job_id: str) -> dict[str, Any]:
        return self.document("GET", f"/v1/jobs/{segment(job_id)}/report")

    def estimate(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self.document("POST", "/v1/estimates", json=dict(body))

    def artifacts(self, *, limit: int = 20, after: str | None = None) -> ArtifactPage:
        return self.read(ArtifactPage, "GET", "/v1/artifacts", params=given({"limit": limit, "after": after}))

    def artifact(self, artifact_id: str) -> ArtifactView:
        return self.read(ArtifactView, "GET", f"/v1/artifacts/{segment(artifact_id)}")

    def deploy(self, body: Mapping[str, Any]) -> DeploymentView:
        return self.read(DeploymentView, "POST", "/v1/deployments", json=dict(body))

    def deployment(self, deployment_id: str) -> DeploymentView:
        return self.read(DeploymentView, "GET", f"/v1/deployments/{segment(deployment_id)}")

    def deployments(self, *, limit: int = 20, after: str | None = None) -> DeploymentPage:
        params = given({"limit": limit, "after": after})
        return self.read(DeploymentPage, "GET", "/v1/deployments", params=params)

    def delete_deployment(self, deployment_id: str) -> None:
        self.send("DELETE", f"/v1/deployments/{segment(deployment_id)}")

    def chat(self, body: Mapping[str, Any], *, on_wait: OnWait = lambda _: None) -> Iterator[Chunk]:
        """The chunks of a streamed answer; a model that loads is waited for."""
        try:
            yield from chat_chunks(self.http, body, on_wait)
        except httpx.TransportError as fault:
            raise unreachable(self.url, fault) from fault

    def ready(self) -> bool:
        """True once the service takes jobs; False while it starts or lacks Redis or storage."""
        try:
            return self.http.get("/readyz", timeout=5.0).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def follow(self, job_id: str) -> Iterator[JobView]:
        """The job now and after each change, until it has ended. A short restart is waited out."""
        etag: str | None = None
        silent_since: float | None = None
        while True:
            headers = {"Prefer": f"wait={LONG_POLL_S}", "If-None-Match": etag} if etag else {}
            try:
                answer = self.send("GET", f"/v1/jobs/{segment(job_id)}", headers=headers)
            except ServiceUnreachable:
                silent_since = silent_since or time.monotonic()
                if etag is None or time.monotonic() - silent_since > RECONNECT_S:
                    raise
                time.sleep(RETRY_S)
                continue
            silent_since = None
            if answer.status_code == httpx.codes.NOT_MODIFIED:
                continue
            job = parse(JobView, answer)
            yield job
            if job.is_terminal:
                return
            etag = answer.headers.get("ETag")
            if etag is None:
                time.sleep(RETRY_S)

    def download(
        self, artifact_id: str, folder: Path, *, on_bytes: Callable[[int], None] = lambda _: None
    ) -> ArtifactView:
        """Write an artifact's files under `folder`; each appears there only after its SHA-256 was checked."""
        artifact = self.artifact(artifact_id)
        for file in artifact.files:
            self.download_file(artifact.id, file, folder, on_bytes=on_bytes)
        return artifact

    def download_file(
        self, artifact_id: str, file: FileView, folder: Path, *, on_bytes: Callable[[int], None]
    ) -> None:
        destination = folder / safe_path(file.path)
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = destination.with_name(destination.name + ".partial")
        digest = hashlib.sha256()
        route = f"/v1/artifacts/{segment(artifact_id)}/files/{quote(file.path)}"
        try:
            with (
                self.http.stream("GET", route, follow_redirects=True) as answer,
                partial.open("wb") as out,
            ):
                if answer.is_error:
                    answer.read()
                    raise refusal(answer)
                for chunk in answer.iter_bytes():
                    out.write(chunk)
                    digest.update(chunk)
                    on_bytes(len(chunk))
            if digest.hexdigest() != file.sha256:
                raise DownloadCorrupt(
                    f"{file.path}: received SHA-256 {digest.hexdigest()}, expected {file.sha256}",
                    remedy="download it again; if it happens twice, the stored file is damaged",
                )
            partial.replace(destination)
        except httpx.TransportError as fault:
            raise unreachable(self.url, fault) from fault
        finally:
            partial.unlink(missing_ok=True)

    def send(self, method: str, route: str, **options: Any) -> httpx.Response:
        try:
            answer = self.http.request(method, route, **options)
        except httpx.TransportError as fault:
            raise unreachable(self.url, fault) from fault
        if answer.is_error:
            raise refusal(answer)
        return answer

    def document(self, method: str, route: str, **options: Any) -> dict[str, Any]:
        answer = self.send(method, route, **options)
        try:
            document: dict[str, Any] = answer.json()
        except json.JSONDecodeError as fault:
            raise foreign(answer) from fault
        return document

    def read(self, shape: type[AnswerT], method: str, route: str, **options: Any) -> AnswerT:
        return parse(shape, self.send(method, route, **options))


def parse(shape: type[AnswerT], answer: httpx.Response) -> AnswerT:
    try:
        return shape.model_validate_json(answer.content)
    except ValidationError as fault:
        raise foreign(answer) from fault


def is_loopback(url: str) -> bool:
    return httpx.URL(url).host in LOOPBACK


def given(params: Mapping[str, object | None]) -> dict[str, str]:
    return {name: str(value) for name, value in params.items() if value is not None}


def segment(name: str) -> str:
    """One path part of a route: an id that holds a slash must not become another route."""
    return quote(name, safe="")


def safe_path(path: str) -> PurePosixPath:
    """A file's path as the service names it, refused if it would leave the download folder."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise DownloadCorrupt(
            f"the service names a file {path!r}, which lies outside the download folder",
            remedy="don't trust this service",
        )
    return parts


def unreachable(url: str, fault: httpx.TransportError) -> ServiceUnreachable:
    return ServiceUnreachable(
        f"no answer from {url}: {str(fault) or type(fault).__name__}",
        remedy="start the service with `nibble up`, or name another one with --url or NIBBLE_URL",
    )


def foreign(answer: httpx.Response) -> ServiceRefused:
    return ServiceRefused(
        f"{answer.request.url} answered with something that Nibble does not send",
        code="unexpected_answer",
        remedy="check that --url names a Nibble service of this version",
    )


def refusal(answer: httpx.Response) -> ServiceRefused:
    """The error of a problem+json answer (RFC 9457)."""
    try:
        problem = answer.json()
    except json.JSONDecodeError:
        problem = None
    if not isinstance(problem, dict):
        problem = {}
    message = problem.get("detail") or problem.get("title") or f"HTTP status {answer.status_code}"
    # The detail names the first field; the others follow it.
    more = [f"{field.get('path')}: {field.get('message')}" for field in problem.get("errors", [])[1:]]
    error = ServiceRefused(
        "\n".join([str(message), *more]),
        code=str(problem.get("code") or f"http_{answer.status_code}"),
        remedy=str(problem.get("remedy") or ""),
        param=problem.get("param"),
    )
    error.status = answer.status_code
    return error
