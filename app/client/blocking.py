"""The client that blocks."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from app.client.connection import Connection, options
from app.client.downloads import OnBytes, ignore_bytes
from app.client.exchange import Exchange
from app.client.following import Chunk, OnWait, ignore_seconds
from app.client.operations import Body, JobLike, Operations
from app.client.retries import Retries
from app.client.views import (
    ArtifactPage,
    ArtifactView,
    AuditPage,
    DeliveryPage,
    DeliveryView,
    DeploymentPage,
    DeploymentView,
    EventPage,
    EventView,
    GarbageView,
    JobPage,
    JobView,
    KeyPage,
    LimitsView,
    LinkView,
    LoginLinkView,
    NewKeyView,
    SecretView,
    WorkerPage,
)


class NibbleClient:
    """One connection to a service. Use it as a context manager."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        retries: Retries | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.http = httpx.Client(**options(self.url, api_key), transport=transport)
        self._connection = Connection(self.http)
        self._ask = Operations(Exchange(self.url, retries or Retries()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()

    # Jobs

    def submit(self, body: Body, *, idempotency_key: str | None = None) -> JobView:
        """Hand over a job: a `JobSpec`, or the body as plain data. Sent again, it still makes one job."""
        return self._connection.run(self._ask.submit(body, idempotency_key=idempotency_key))

    def job(self, job: JobLike) -> JobView:
        return self._connection.run(self._ask.job(job))

    def jobs(
        self, *, state: str | None = None, label: str | None = None, limit: int = 20, after: str | None = None
    ) -> JobPage:
        """A page of jobs, newest first."""
        return self._connection.run(self._ask.job_page(state=state, label=label, limit=limit, after=after))

    def each_job(
        self, *, state: str | None = None, label: str | None = None
    ) -> Generator[JobView, None, None]:
        """Every job, newest first."""
        return self._connection.stream(self._ask.each_job(state=state, label=label))

    def cancel(self, job: JobLike) -> JobView:
        return self._connection.run(self._ask.cancel(job))

    def retry(self, job: JobLike, *, idempotency_key: str | None = None) -> JobView:
        """A new job with the spec of one that has ended."""
        return self._connection.run(self._ask.retry(job, idempotency_key=idempotency_key))

    def delete_job(self, job: JobLike) -> None:
        self._connection.run(self._ask.delete_job(job))

    def report(self, job: JobLike) -> dict[str, Any]:
        return self._connection.run(self._ask.report(job))

    def estimate(self, body: Body) -> dict[str, Any]:
        return self._connection.run(self._ask.estimate(body))

    def follow(self, job: JobLike) -> Generator[JobView, None, None]:
        """The job now and after each change, until it has ended."""
        return self._connection.stream(self._ask.follow(job))

    def wait_for(self, job: JobLike, timeout: float | None = None) -> JobView:
        """The job once it has ended, however it ended. Raises WaitTimedOut after `timeout` seconds."""
        return self._connection.run(self._ask.wait_for(job, timeout))

    def events(self, job: JobLike, *, after: str | None = None) -> Generator[EventView, None, None]:
        """Events as they happen, until the job has ended. A broken connection is taken up where it broke."""
        return self._connection.stream(self._ask.events(job, after=after))

    def event_page(self, job: JobLike, *, after: str | None = None, limit: int = 100) -> EventPage:
        return self._connection.run(self._ask.event_page(job, after=after, limit=limit))

    def webhook_deliveries(self, job: JobLike) -> DeliveryPage:
        return self._connection.run(self._ask.webhook_deliveries(job))

    def redeliver(self, job: JobLike, delivery_id: str) -> DeliveryView:
        return self._connection.run(self._ask.redeliver(job, delivery_id))

    # Artifacts

    def artifact(self, artifact_id: str) -> ArtifactView:
        return self._connection.run(self._ask.artifact(artifact_id))

    def artifacts(self, *, limit: int = 20, after: str | None = None) -> ArtifactPage:
        """A page of artifacts, newest first."""
        return self._connection.run(self._ask.artifact_page(limit=limit, after=after))

    def each_artifact(self) -> Generator[ArtifactView, None, None]:
        return self._connection.stream(self._ask.each_artifact())

    def delete_artifact(self, artifact_id: str) -> None:
        self._connection.run(self._ask.delete_artifact(artifact_id))

    def link(self, artifact_id: str, path: str, *, expires_in_s: int = 3600) -> LinkView:
        """A link that reads one file without a key."""
        return self._connection.run(self._ask.link(artifact_id, path, expires_in_s=expires_in_s))

    def download(self, artifact_id: str, folder: Path, *, on_bytes: OnBytes = ignore_bytes) -> ArtifactView:
        """Write an artifact's files under `folder`; each appears there only after its SHA-256 was checked.

        What an earlier download left is continued, and what is there already is not sent again.
        """
        return self._connection.run(self._ask.download(artifact_id, folder, on_bytes))

    # Deployments

    def deploy(self, body: Body, *, idempotency_key: str | None = None) -> DeploymentView:
        return self._connection.run(self._ask.deploy(body, idempotency_key=idempotency_key))

    def deployment(self, deployment_id: str) -> DeploymentView:
        return self._connection.run(self._ask.deployment(deployment_id))

    def deployments(self, *, limit: int = 20, after: str | None = None) -> DeploymentPage:
        """A page of deployments, newest first."""
        return self._connection.run(self._ask.deployment_page(limit=limit, after=after))

    def each_deployment(self) -> Generator[DeploymentView, None, None]:
        return self._connection.stream(self._ask.each_deployment())

    def deployment_named(self, name: str) -> DeploymentView:
        """The deployment of that name or id. Raises NotFound."""
        return self._connection.run(self._ask.deployment_named(name))

    def delete_deployment(self, deployment_id: str, *, wait: bool = False) -> None:
        """Take no more requests, finish those that run, then stop. With `wait`, until that has happened."""
        self._connection.run(self._ask.delete_deployment(deployment_id, wait=wait))

    def follow_deployment(self, deployment_id: str) -> Generator[DeploymentView, None, None]:
        """The deployment now and after each change, without end."""
        return self._connection.stream(self._ask.follow_deployment(deployment_id))

    def chat(
        self, body: Mapping[str, Any], *, on_wait: OnWait = ignore_seconds
    ) -> Generator[Chunk, None, None]:
        """The chunks of a streamed answer; a model that loads is waited for."""
        return self._connection.stream(self._ask.chat(body, on_wait))

    # The service itself

    def ready(self) -> bool:
        """True once the service takes jobs; False while it starts or lacks Redis or storage."""
        return self._connection.run(self._ask.ready())

    def workers(self) -> WorkerPage:
        return self._connection.run(self._ask.workers())

    def login_link(self) -> LoginLinkView:
        return self._connection.run(self._ask.login_link())

    def collect_garbage(self, *, dry_run: bool = False) -> GarbageView:
        return self._connection.run(self._ask.collect_garbage(dry_run=dry_run))

    def audit(self, *, limit: int = 100, after: str | None = None) -> AuditPage:
        return self._connection.run(self._ask.audit(limit=limit, after=after))

    # Access

    def create_key(self, body: Mapping[str, Any]) -> NewKeyView:
        return self._connection.run(self._ask.create_key(body))

    def keys(self, *, tenant: str | None = None) -> KeyPage:
        return self._connection.run(self._ask.keys(tenant=tenant))

    def revoke_key(self, key_id: str) -> None:
        self._connection.run(self._ask.revoke_key(key_id))

    def tenant_limits(self, tenant: str) -> LimitsView:
        return self._connection.run(self._ask.tenant_limits(tenant))

    def set_tenant_limits(self, tenant: str, limits: Mapping[str, int]) -> LimitsView:
        return self._connection.run(self._ask.set_tenant_limits(tenant, limits))

    def webhook_secret(self) -> SecretView:
        return self._connection.run(self._ask.webhook_secret())

    def rotate_webhook_secret(self) -> SecretView:
        return self._connection.run(self._ask.rotate_webhook_secret())
