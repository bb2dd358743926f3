"""The service's answers as typed records. Unknown fields of a newer service are ignored."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from app.client.errors import JobEnded
from app.core.records.job import TERMINAL, Problem, Progress
from app.core.records.push import ENDED_PUSHES


class ServiceAnswer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class JobAnswer(ServiceAnswer):
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
    worker: str | None = None  # of its last attempt
    artifacts: tuple[str, ...] = ()
    retry_of: str | None = None
    reused_from: str | None = None
    has_hub_token: bool = False

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL

    def require_success(self) -> Self:
        """This job, if it succeeded. Raises JobEnded: with its error if it failed."""
        if self.state == "succeeded":
            return self
        if self.error is None:
            remedy = (
                "`nibble retry {}` runs it again" if self.is_terminal else "`nibble watch {}` shows its end"
            )
            raise JobEnded(
                f"{self.id} is {self.state}", code=f"job_{self.state}", remedy=remedy.format(self.id)
            )
        raise JobEnded(f"{self.id}: {self.error.message}", code=self.error.code, remedy=self.error.remedy)


class FileAnswer(ServiceAnswer):
    path: str
    size: int
    sha256: str


class PushAnswer(ServiceAnswer):
    id: str
    artifact: str
    state: str
    repo_id: str
    revision: str | None = None
    sent_bytes: int = 0
    created_at: datetime | None = None
    finished_at: datetime | None = None
    url: str | None = None
    commit: str | None = None
    commit_url: str | None = None
    error: Problem | None = None

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED_PUSHES


class ArtifactAnswer(ServiceAnswer):
    id: str
    job: str
    created_at: datetime
    model: str
    model_digest: str = ""
    adapter: str | None = None
    adapter_digest: str | None = None
    format: str
    recipe: dict[str, Any] = Field(default_factory=dict)
    summary: dict[str, Any] = Field(default_factory=dict)
    files: tuple[FileAnswer, ...] = ()
    tags: tuple[str, ...] = ()
    pushes: tuple[PushAnswer, ...] = ()

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


class DatasetAnswer(ServiceAnswer):
    """A text of one's own; `reference` is what a job's calibration or evaluation names it by."""

    id: str
    name: str
    created_at: datetime
    size: int
    sha256: str
    reference: str
    documents: int | None = None
    conversations: int | None = None
    tokens: int | None = None
    sequence_length: int = 512
    windows: int | None = None
    is_estimate: bool = False
    first: tuple[str, ...] = ()


class LinkAnswer(ServiceAnswer):
    url: str
    expires_at: datetime


class ServerAnswer(ServiceAnswer):
    slot: int
    generation: int = 1
    worker: str
    engine: str
    state: str
    running: int = 0
    waiting: int = 0
    restarts: int = 0


class ReplacementAnswer(ServiceAnswer):
    """What takes the place of what a deployment serves; with `error` it does not."""

    generation: int
    served: dict[str, Any]  # artifact, and the options of its servers
    ready: int = 0
    error: Problem | None = None


class DeploymentAnswer(ServiceAnswer):
    id: str
    name: str
    artifact: str
    original: bool = False  # the model that the artifact was made of is served
    engine: str
    state: str
    reason: str = ""
    error: Problem | None = None
    aliases: tuple[str, ...] = ()
    idle_timeout_s: int | None = None
    replicas: int = 1
    revision: int = 1  # one more with each change by its owner
    generation: int = 1  # of its artifact and its servers' options
    replacement: ReplacementAnswer | None = None
    servers: tuple[ServerAnswer, ...] = ()
    job: str | None = None
    created_at: datetime


class EventAnswer(ServiceAnswer):
    id: str
    kind: str
    at: datetime | None = None
    payload: dict[str, Any] = Field(default_factory=dict)


class SourceAnswer(ServiceAnswer):
    """A model to choose from; `origin` is recent, folder or hub."""

    reference: str
    origin: str
    downloads: int | None = None


class SourcesAnswer(ServiceAnswer):
    sources: tuple[SourceAnswer, ...] = Field(alias="data")
    hub: str = "not_asked"  # asked, or no_answer


class WorkerAnswer(ServiceAnswer):
    name: str
    host: str
    device: str
    device_name: str = ""
    queue: str
    state: str  # idle, measuring (and taking jobs), busy
    rates: str | None = None  # of its device: measured, measured in part, nominal
    servers: int = 0
    job: str | None = None
    started_at: datetime
    heartbeat_at: datetime


class KeyAnswer(ServiceAnswer):
    id: str
    tenant: str
    name: str = ""
    scopes: tuple[str, ...] = ()
    created_at: datetime
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    expired: bool = False


class NewKeyAnswer(KeyAnswer):
    """A new key; `key` is shown only once."""

    key: str


class DeliveryAnswer(ServiceAnswer):
    id: str
    job: str
    type: str
    url: str
    state: str
    created_at: datetime
    tries: tuple[dict[str, Any], ...] = ()


class AuditAnswer(ServiceAnswer):
    id: str
    at: datetime | None = None
    key_id: str = ""
    request_id: str = ""
    method: str = ""
    path: str = ""
    status: int = 0
    detail: str = ""


class LimitsAnswer(ServiceAnswer):
    """A tenant's limits (0 means none) and use."""

    tenant: str
    limits: dict[str, int]
    usage: dict[str, int]


class StorageAnswer(ServiceAnswer):
    """What the caller's tenant stores: `count` and `bytes` of each kind."""

    tenant: str
    artifacts: dict[str, int]
    datasets: dict[str, int]
    is_complete: bool = True


class SettingAnswer(ServiceAnswer):
    """A setting in force; `value` is None if it is empty, and masked if it is secret."""

    name: str
    value: str | None = None
    is_set: bool = False
    is_secret: bool = False
    meaning: str = ""


class SecretAnswer(ServiceAnswer):
    secret: str


class LoginLinkAnswer(ServiceAnswer):
    path: str
    expires_at: datetime


class GarbageAnswer(ServiceAnswer):
    """The removed ids by kind, or with `dry_run` those to remove."""

    checkpoints: tuple[str, ...] = ()
    artifacts: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    bytes: int | None = None  # of the folders, with `dry_run`


ItemT = TypeVar("ItemT")


class Page(ServiceAnswer, Generic[ItemT]):
    """A page of a list; `next` is the cursor of the next page."""

    items: tuple[ItemT, ...] = Field(alias="data")
    has_more: bool = False
    next: str | None = None


class VersionsAnswer(ServiceAnswer):
    """A source model and what was made of it, newest first."""

    model: str
    tags: dict[str, str] = Field(default_factory=dict)
    versions: tuple[ArtifactAnswer, ...] = ()


JobPage = Page[JobAnswer]  # Jobs, newest first.
ArtifactPage = Page[ArtifactAnswer]  # Artifacts, newest first.
DatasetPage = Page[DatasetAnswer]  # Datasets, newest first.
DeploymentPage = Page[DeploymentAnswer]  # Deployments, newest first.
EventPage = Page[EventAnswer]  # Events, oldest first.
WorkerPage = Page[WorkerAnswer]  # Live workers.
KeyPage = Page[KeyAnswer]  # Keys, oldest first.
DeliveryPage = Page[DeliveryAnswer]  # Webhooks of a job, oldest first.
RegistryPage = Page[VersionsAnswer]  # Models, the one with the newest artifact first.
SettingPage = Page[SettingAnswer]  # Settings, in the order of the code.
AuditPage = Page[AuditAnswer]  # Changes, newest first.
