"""The client that awaits."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from app.client.connection import AsyncConnection, options
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


class AsyncNibbleClient:
    """One connection to a service, for an event loop. Use it as an asynchronous context manager."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        retries: Retries | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.http = httpx.AsyncClient(**options(self.url, api_key), transport=transport)
        self._connection = AsyncConnection(self.http)
        self._ask = Operations(Exchange(self.url, retries or Retries()))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.http.aclose()

    # Jobs

    async def submit(self, body: Body, *, idempotency_key: str | None = None) -> JobView:
        """Hand over a job: a `JobSpec`, or the body as plain data. Sent again, it still makes one job."""
        return await self._connection.run(self._ask.submit(body, idempotency_key=idempotency_key))

    async def job(self, job: JobLike) -> JobView:
        return await self._connection.run(self._ask.job(job))

    async def jobs(
        self, *, state: str | None = None, label: str | None = None, limit: int = 20, after: str | None = None
    ) -> JobPage:
        """A page of jobs, newest first."""
        return await self._connection.run(
            self._ask.job_page(state=state, label=label, limit=limit, after=after)
        )

    def each_job(
        self, *, state: str | None = None, label: str | None = None
    ) -> AsyncGenerator[JobView, None]:
        """Every job, newest first."""
        return self._connection.stream(self._ask.each_job(state=state, label=label))

    async def cancel(self, job: JobLike) -> JobView:
        return await self._connection.run(self._ask.cancel(job))

    async def retry(self, job: JobLike, *, idempotency_key: str | None = None) -> JobView:
        """A new job with the spec of one that has ended."""
        return await self._connection.run(self._ask.retry(job, idempotency_key=idempotency_key))

    async def delete_job(self, job: JobLike) -> None:
        await self._connection.run(self._ask.delete_job(job))

    async def report(self, job: JobLike) -> dict[str, Any]:
        return await self._connection.run(self._ask.report(job))

    async def estimate(self, body: Body) -> dict[str, Any]:
        return await self._connection.run(self._ask.estimate(body))

    def follow(self, job: JobLike) -> AsyncGenerator[JobView, None]:
        """The job now and after each change, until it has ended."""
        return self._connection.stream(self._ask.follow(job))

    async def wait_for(self, job: JobLike, timeout: float | None = None) -> JobView:
        """The job once it has ended, however it ended. Raises WaitTimedOut after `timeout` seconds."""
        return await self._connection.run(self._ask.wait_for(job, timeout))

    def events(self, job: JobLike, *, after: str | None = None) -> AsyncGenerator[EventView, None]:
        """Events as they happen, until the job has ended. A broken connection is taken up where it broke."""
        return self._connection.stream(self._ask.events(job, after=after))

    async def event_page(self, job: JobLike, *, after: str | None = None, limit: int = 100) -> EventPage:
        return await self._connection.run(self._ask.event_page(job, after=after, limit=limit))

    async def webhook_deliveries(self, job: JobLike) -> DeliveryPage:
        return await self._connection.run(self._ask.webhook_deliveries(job))

    async def redeliver(self, job: JobLike, delivery_id: str) -> DeliveryView:
        return await self._connection.run(self._ask.redeliver(job, delivery_id))

    # Artifacts

    async def artifact(self, artifact_id: str) -> ArtifactView:
        return await self._connection.run(self._ask.artifact(artifact_id))

    async def artifacts(self, *, limit: int = 20, after: str | None = None) -> ArtifactPage:
        """A page of artifacts, newest first."""
        return await self._connection.run(self._ask.artifact_page(limit=limit, after=after))

    def each_artifact(self) -> AsyncGenerator[ArtifactView, None]:
        return self._connection.stream(self._ask.each_artifact())

    async def delete_artifact(self, artifact_id: str) -> None:
        await self._connection.run(self._ask.delete_artifact(artifact_id))

    async def link(self, artifact_id: str, path: str, *, expires_in_s: int = 3600) -> LinkView:
        """A link that reads one file without a key."""
        return await self._connection.run(self._ask.link(artifact_id, path, expires_in_s=expires_in_s))

    async def download(
        self, artifact_id: str, folder: Path, *, on_bytes: OnBytes = ignore_bytes
    ) -> ArtifactView:
        """Write an artifact's files under `folder`; each appears there only after its SHA-256 was checked.

        What an earlier download left is continued, and what is there already is not sent again.
        """
        return await self._connection.run(self._ask.download(artifact_id, folder, on_bytes))

    # Deployments

    async def deploy(self, body: Body, *, idempotency_key: str | None = None) -> DeploymentView:
        return await self._connection.run(self._ask.deploy(body, idempotency_key=idempotency_key))

    async def deployment(self, deployment_id: str) -> DeploymentView:
        return await self._connection.run(self._ask.deployment(deployment_id))

    async def deployments(self, *, limit: int = 20, after: str | None = None) -> DeploymentPage:
        """A page of deployments, newest first."""
        return await self._connection.run(self._ask.deployment_page(limit=limit, after=after))

    def each_deployment(self) -> AsyncGenerator[DeploymentView, None]:
        return self._connection.stream(self._ask.each_deployment())

    async def deployment_named(self, name: str) -> DeploymentView:
        """The deployment of that name or id. Raises NotFound."""
        return await self._connection.run(self._ask.deployment_named(name))

    async def delete_deployment(self, deployment_id: str, *, wait: bool = False) -> None:
        """Take no more requests, finish those that run, then stop. With `wait`, until that has happened."""
        await self._connection.run(self._ask.delete_deployment(deployment_id, wait=wait))

    def follow_deployment(self, deployment_id: str) -> AsyncGenerator[DeploymentView, None]:
        """The deployment now and after each change, without end."""
        return self._connection.stream(self._ask.follow_deployment(deployment_id))

    def chat(
        self, body: Mapping[str, Any], *, on_wait: OnWait = ignore_seconds
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks of a streamed answer; a model that loads is waited for."""
        return self._connection.stream(self._ask.chat(body, on_wait))

    # The service itself

    async def ready(self) -> bool:
        """True once the service takes jobs; False while it starts or lacks Redis or storage."""
        return await self._connection.run(self._ask.ready())

    async def workers(self) -> WorkerPage:
        return await self._connection.run(self._ask.workers())

    async def login_link(self) -> LoginLinkView:
        return await self._connection.run(self._ask.login_link())

    async def collect_garbage(self, *, dry_run: bool = False) -> GarbageView:
        return await self._connection.run(self._ask.collect_garbage(dry_run=dry_run))

    async def audit(self, *, limit: int = 100, after: str | None = None) -> AuditPage:
        return await self._connection.run(self._ask.audit(limit=limit, after=after))

    # Access

    async def create_key(self, body: Mapping[str, Any]) -> NewKeyView:
        return await self._connection.run(self._ask.create_key(body))

    async def keys(self, *, tenant: str | None = None) -> KeyPage:
        return await self._connection.run(self._ask.keys(tenant=tenant))

    async def revoke_key(self, key_id: str) -> None:
        await self._connection.run(self._ask.revoke_key(key_id))

    async def tenant_limits(self, tenant: str) -> LimitsView:
        return await self._connection.run(self._ask.tenant_limits(tenant))

    async def set_tenant_limits(self, tenant: str, limits: Mapping[str, int]) -> LimitsView:
        return await self._connection.run(self._ask.set_tenant_limits(tenant, limits))

    async def webhook_secret(self) -> SecretView:
        return await self._connection.run(self._ask.webhook_secret())

    async def rotate_webhook_secret(self) -> SecretView:
        return await self._connection.run(self._ask.rotate_webhook_secret())
