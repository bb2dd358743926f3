"""Everything that the service can be asked, as flows and streams that any connection can carry out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import httpx
from pydantic import BaseModel

from app.client import views
from app.client.downloads import OnBytes, artifact_files
from app.client.effects import Call, Emit, Flow, Send, Stream
from app.client.errors import NotFound
from app.client.exchange import Exchange
from app.client.following import (
    Chunk,
    OnWait,
    chat_chunks,
    deployment_changes,
    deployment_gone,
    ended_job,
    job_changes,
    job_events,
)
from app.client.routes import artifact_route, deployment_route, given, job_route, route

PAGE = 100  # the most that a page holds
READY_LIMIT_S = 5.0

Body = BaseModel | Mapping[str, Any]
JobLike = views.JobView | str
ItemT = TypeVar("ItemT")
PageOf = Callable[[str | None], Flow[views.Page[ItemT]]]


def plain(body: Body) -> dict[str, Any]:
    if isinstance(body, BaseModel):
        return body.model_dump(mode="json", exclude_unset=True)
    return dict(body)


def id_of(job: JobLike) -> str:
    return job.id if isinstance(job, views.JobView) else job


def keyed(idempotency_key: str | None) -> dict[str, str]:
    """A POST with this header makes one thing, however often it is sent."""
    return {"Idempotency-Key": idempotency_key or str(uuid4())}


class Operations:
    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    # Jobs

    def submit(self, body: Body, *, idempotency_key: str | None = None) -> Flow[views.JobView]:
        call = Call("POST", "/v1/jobs", json=plain(body), headers=keyed(idempotency_key))
        return self.exchange.read(views.JobView, call)

    def job(self, job: JobLike) -> Flow[views.JobView]:
        return self.exchange.read(views.JobView, Call("GET", job_route(id_of(job))))

    def job_page(
        self, *, state: str | None, label: str | None, limit: int, after: str | None
    ) -> Flow[views.JobPage]:
        params = given({"state": state, "label": label, "limit": limit, "after": after})
        return self.exchange.read(views.JobPage, Call("GET", "/v1/jobs", params=params))

    def each_job(self, *, state: str | None, label: str | None) -> Stream[views.JobView]:
        return each(lambda after: self.job_page(state=state, label=label, limit=PAGE, after=after))

    def cancel(self, job: JobLike) -> Flow[views.JobView]:
        # Cancelling twice is cancelling once.
        return self.exchange.read(
            views.JobView, Call("POST", job_route(id_of(job), "cancel"), repeatable=True)
        )

    def retry(self, job: JobLike, *, idempotency_key: str | None = None) -> Flow[views.JobView]:
        headers = keyed(idempotency_key)
        return self.exchange.read(
            views.JobView, Call("POST", job_route(id_of(job), "retry"), headers=headers)
        )

    def delete_job(self, job: JobLike) -> Flow[None]:
        return self.exchange.done(Call("DELETE", job_route(id_of(job))))

    def event_page(self, job: JobLike, *, after: str | None, limit: int) -> Flow[views.EventPage]:
        params = given({"after": after, "limit": limit})
        return self.exchange.read(
            views.EventPage, Call("GET", job_route(id_of(job), "events"), params=params)
        )

    def report(self, job: JobLike) -> Flow[dict[str, Any]]:
        return self.exchange.document(Call("GET", job_route(id_of(job), "report")))

    def estimate(self, body: Body) -> Flow[dict[str, Any]]:
        call = Call("POST", "/v1/estimates", json=plain(body), repeatable=True)
        return self.exchange.document(call)

    def follow(self, job: JobLike) -> Stream[views.JobView]:
        return job_changes(self.exchange, id_of(job))

    def wait_for(self, job: JobLike, timeout: float | None) -> Flow[views.JobView]:
        return ended_job(self.exchange, id_of(job), timeout_s=timeout)

    def events(self, job: JobLike, *, after: str | None) -> Stream[views.EventView]:
        return job_events(self.exchange, id_of(job), after)

    def webhook_deliveries(self, job: JobLike) -> Flow[views.DeliveryPage]:
        return self.exchange.read(
            views.DeliveryPage, Call("GET", job_route(id_of(job), "webhook-deliveries"))
        )

    def redeliver(self, job: JobLike, delivery_id: str) -> Flow[views.DeliveryView]:
        where = job_route(id_of(job), "webhook-deliveries", delivery_id, "redeliver")
        return self.exchange.read(views.DeliveryView, Call("POST", where))

    # Artifacts

    def artifact(self, artifact_id: str) -> Flow[views.ArtifactView]:
        return self.exchange.read(views.ArtifactView, Call("GET", artifact_route(artifact_id)))

    def artifact_page(self, *, limit: int, after: str | None) -> Flow[views.ArtifactPage]:
        params = given({"limit": limit, "after": after})
        return self.exchange.read(views.ArtifactPage, Call("GET", "/v1/artifacts", params=params))

    def each_artifact(self) -> Stream[views.ArtifactView]:
        return each(lambda after: self.artifact_page(limit=PAGE, after=after))

    def delete_artifact(self, artifact_id: str) -> Flow[None]:
        return self.exchange.done(Call("DELETE", artifact_route(artifact_id)))

    def link(self, artifact_id: str, path: str, *, expires_in_s: int) -> Flow[views.LinkView]:
        body = {"path": path, "expires_in_s": expires_in_s}
        call = Call("POST", artifact_route(artifact_id, "links"), json=body, repeatable=True)
        return self.exchange.read(views.LinkView, call)

    def download(self, artifact_id: str, folder: Path, on_bytes: OnBytes) -> Flow[views.ArtifactView]:
        artifact = yield from self.artifact(artifact_id)
        yield from artifact_files(self.exchange, artifact, folder, on_bytes)
        return artifact

    # Deployments

    def deploy(self, body: Body, *, idempotency_key: str | None = None) -> Flow[views.DeploymentView]:
        call = Call("POST", "/v1/deployments", json=plain(body), headers=keyed(idempotency_key))
        return self.exchange.read(views.DeploymentView, call)

    def deployment(self, deployment_id: str) -> Flow[views.DeploymentView]:
        return self.exchange.read(views.DeploymentView, Call("GET", deployment_route(deployment_id)))

    def deployment_page(self, *, limit: int, after: str | None) -> Flow[views.DeploymentPage]:
        params = given({"limit": limit, "after": after})
        return self.exchange.read(views.DeploymentPage, Call("GET", "/v1/deployments", params=params))

    def each_deployment(self) -> Stream[views.DeploymentView]:
        return each(lambda after: self.deployment_page(limit=PAGE, after=after))

    def deployment_named(self, name: str) -> Flow[views.DeploymentView]:
        """The deployment of that name or id that is not on its way out."""
        after: str | None = None
        while True:
            page = yield from self.deployment_page(limit=PAGE, after=after)
            for each_one in page.items:
                if name in (each_one.name, each_one.id) and each_one.state != "draining":
                    return each_one
            if page.next is None:
                raise NotFound(
                    f"there is no deployment {name!r}",
                    code="deployment_not_found",
                    remedy="`nibble deployments` lists them",
                )
            after = page.next

    def delete_deployment(self, deployment_id: str, *, wait: bool) -> Flow[None]:
        yield from self.exchange.done(Call("DELETE", deployment_route(deployment_id)))
        if wait:
            yield from deployment_gone(self.exchange, deployment_id)

    def follow_deployment(self, deployment_id: str) -> Stream[views.DeploymentView]:
        return deployment_changes(self.exchange, deployment_id)

    def chat(self, body: Mapping[str, Any], on_wait: OnWait) -> Stream[Chunk]:
        return chat_chunks(self.exchange, body, on_wait)

    # The service itself

    def workers(self) -> Flow[views.WorkerPage]:
        return self.exchange.read(views.WorkerPage, Call("GET", "/v1/workers"))

    def ready(self) -> Flow[bool]:
        try:
            answer = yield Send(Call("GET", "/readyz", read_timeout_s=READY_LIMIT_S))
        except httpx.TransportError:
            return False
        return bool(answer.is_success)

    def login_link(self) -> Flow[views.LoginLinkView]:
        return self.exchange.read(views.LoginLinkView, Call("POST", "/v1/login-links", repeatable=True))

    def collect_garbage(self, *, dry_run: bool) -> Flow[views.GarbageView]:
        params = {"dry_run": str(dry_run).lower()}
        call = Call("POST", "/v1/gc", params=params, repeatable=True)
        return self.exchange.read(views.GarbageView, call)

    def audit(self, *, limit: int, after: str | None) -> Flow[views.AuditPage]:
        params = given({"limit": limit, "after": after})
        return self.exchange.read(views.AuditPage, Call("GET", "/v1/audit", params=params))

    # Access. A key is shown once: if that answer was lost, the repetition is refused by name of the key.

    def create_key(self, body: Mapping[str, Any]) -> Flow[views.NewKeyView]:
        return self.exchange.read(
            views.NewKeyView, Call("POST", "/v1/keys", json=dict(body), headers=keyed(None))
        )

    def keys(self, *, tenant: str | None) -> Flow[views.KeyPage]:
        return self.exchange.read(views.KeyPage, Call("GET", "/v1/keys", params=given({"tenant": tenant})))

    def revoke_key(self, key_id: str) -> Flow[None]:
        return self.exchange.done(Call("DELETE", route("keys", key_id)))

    def tenant_limits(self, tenant: str) -> Flow[views.LimitsView]:
        return self.exchange.read(views.LimitsView, Call("GET", route("tenants", tenant, "limits")))

    def set_tenant_limits(self, tenant: str, limits: Mapping[str, int]) -> Flow[views.LimitsView]:
        call = Call("PUT", route("tenants", tenant, "limits"), json=dict(limits))
        return self.exchange.read(views.LimitsView, call)

    def webhook_secret(self) -> Flow[views.SecretView]:
        return self.exchange.read(views.SecretView, Call("GET", "/v1/webhook-secret"))

    def rotate_webhook_secret(self) -> Flow[views.SecretView]:
        return self.exchange.read(views.SecretView, Call("POST", "/v1/webhook-secret/rotate"))


def each(page_after: PageOf[ItemT]) -> Stream[ItemT]:
    """Every item of a list, page by page."""
    after: str | None = None
    while True:
        page = yield from page_after(after)
        for item in page.items:
            yield Emit(item)
        if page.next is None:
            return
        after = page.next
