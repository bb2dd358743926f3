"""Every operation of the service."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import httpx
from pydantic import BaseModel

from app.client import views
from app.client.connection import returns, yields
from app.client.effects import Call, Emit, Flow, Send, Stream
from app.client.exchange import Exchange
from app.client.following import (
    Chunk,
    OnWait,
    chat_chunks,
    deployment_changes,
    deployment_gone,
    ended_job,
    ignore_seconds,
    job_changes,
    job_events,
    push_changes,
)
from app.client.paths import artifact_route, dataset_route, deployment_route, job_route, query, route
from app.client.resumed_download import OnBytes, artifact_files, ignore_bytes
from app.core.errors import NotFound

PAGE = 100  # largest page of a list
READY_LIMIT_S = 5.0
UPLOAD_ANSWER_S = 300.0  # of a large file

Body = BaseModel | Mapping[str, Any]
JobLike = views.JobAnswer | str
ItemT = TypeVar("ItemT")
PageOf = Callable[[str | None], Flow[views.Page[ItemT]]]


def plain(body: Body) -> dict[str, Any]:
    if not isinstance(body, BaseModel):
        return dict(body)
    fields = body.model_dump(mode="json", exclude_unset=True)
    token = getattr(body, "hub_token", None)
    if token is not None:  # dumped as asterisks
        fields["hub_token"] = token.get_secret_value()
    return fields


def id_of(job: JobLike) -> str:
    return job.id if isinstance(job, views.JobAnswer) else job


def keyed(idempotency_key: str | None) -> dict[str, str]:
    """A header that makes a POST safe to repeat."""
    return {"Idempotency-Key": idempotency_key or str(uuid4())}


class Operations:
    """The operations of both clients. Each method is one flow; the client decides how to wait."""

    exchange: Exchange

    # Jobs

    @returns
    def submit(self, body: Body, *, idempotency_key: str | None = None) -> Flow[views.JobAnswer]:
        """Submit a job: a `JobSpec`, or the body as plain data. Retries create no second job."""
        call = Call("POST", "/v1/jobs", json=plain(body), headers=keyed(idempotency_key))
        return self.exchange.read(views.JobAnswer, call)

    @returns
    def job(self, job: JobLike) -> Flow[views.JobAnswer]:
        return self.exchange.read(views.JobAnswer, Call("GET", job_route(id_of(job))))

    @returns
    def jobs(
        self, *, state: str | None = None, label: str | None = None, limit: int = 20, after: str | None = None
    ) -> Flow[views.JobPage]:
        """A page of jobs, newest first."""
        params = query({"state": state, "label": label, "limit": limit, "after": after})
        return self.exchange.read(views.JobPage, Call("GET", "/v1/jobs", params=params))

    @yields
    def each_job(self, *, state: str | None = None, label: str | None = None) -> Stream[views.JobAnswer]:
        """Every job, newest first."""
        return each(lambda after: Operations.jobs(self, state=state, label=label, limit=PAGE, after=after))

    @returns
    def cancel(self, job: JobLike) -> Flow[views.JobAnswer]:
        # Cancelling twice has the effect of cancelling once.
        return self.exchange.read(
            views.JobAnswer, Call("POST", job_route(id_of(job), "cancel"), repeatable=True)
        )

    @returns
    def retry(
        self,
        job: JobLike,
        *,
        hub_token: str | None = None,
        timeout_s: int | None = None,
        force: bool = False,
        idempotency_key: str | None = None,
    ) -> Flow[views.JobAnswer]:
        """A new job with the spec of one that has ended, but for what is named here.

        A hub token is not kept: bring it again. `force` computes again what was made before.
        """
        changes = {"hub_token": hub_token, "timeout_s": timeout_s, "force": True if force else None}
        body = {name: value for name, value in changes.items() if value is not None}
        where = job_route(id_of(job), "retry")
        call = Call("POST", where, json=body or None, headers=keyed(idempotency_key))
        return self.exchange.read(views.JobAnswer, call)

    @returns
    def delete_job(self, job: JobLike) -> Flow[None]:
        return self.exchange.done(Call("DELETE", job_route(id_of(job))))

    @returns
    def event_page(
        self, job: JobLike, *, after: str | None = None, limit: int = 100
    ) -> Flow[views.EventPage]:
        params = query({"after": after, "limit": limit})
        return self.exchange.read(
            views.EventPage, Call("GET", job_route(id_of(job), "events"), params=params)
        )

    @returns
    def report(self, job: JobLike) -> Flow[dict[str, Any]]:
        return self.exchange.document(Call("GET", job_route(id_of(job), "report")))

    @returns
    def export(self, job: JobLike) -> Flow[dict[str, Any]]:
        """The job as flat `params`, `metrics`, `tags` and `artifacts`, for experiment trackers."""
        return self.exchange.document(Call("GET", job_route(id_of(job), "export")))

    @returns
    def sources(self, text: str = "", *, limit: int = 8) -> Flow[views.SourcesAnswer]:
        """Models that may be meant: of recent jobs, in folders, on the hub; at most `limit` of each."""
        params = query({"q": text, "limit": limit})
        return self.exchange.read(views.SourcesAnswer, Call("GET", "/v1/sources", params=params))

    @returns
    def estimate(self, body: Body) -> Flow[dict[str, Any]]:
        call = Call("POST", "/v1/estimates", json=plain(body), repeatable=True)
        return self.exchange.document(call)

    @returns
    def recommend(self, body: Body) -> Flow[dict[str, Any]]:
        """A recipe for a model on a device: a `RecommendationRequest`, or `model`, `gpu` and the like."""
        call = Call("POST", "/v1/recommendations", json=plain(body), repeatable=True)
        return self.exchange.document(call)

    @yields
    def follow(self, job: JobLike) -> Stream[views.JobAnswer]:
        """The job now and after each change, until it has ended."""
        return job_changes(self.exchange, id_of(job))

    @returns
    def wait_for(self, job: JobLike, timeout: float | None = None) -> Flow[views.JobAnswer]:
        """Return the job once it has ended, in any state. Raises WaitTimedOut after `timeout` seconds."""
        return ended_job(self.exchange, id_of(job), timeout_s=timeout)

    @yields
    def events(self, job: JobLike, *, after: str | None = None) -> Stream[views.EventAnswer]:
        """Events as they happen, until the job has ended. A broken connection is resumed."""
        return job_events(self.exchange, id_of(job), after)

    @returns
    def webhook_deliveries(self, job: JobLike) -> Flow[views.DeliveryPage]:
        return self.exchange.read(
            views.DeliveryPage, Call("GET", job_route(id_of(job), "webhook-deliveries"))
        )

    @returns
    def recent_webhook_deliveries(
        self, *, state: str | None = None, limit: int = 50, after: str | None = None
    ) -> Flow[views.DeliveryPage]:
        """A page of the newest webhooks about any job, newest first."""
        params = query({"state": state, "limit": limit, "after": after})
        return self.exchange.read(views.DeliveryPage, Call("GET", "/v1/webhook-deliveries", params=params))

    @returns
    def redeliver(self, job: JobLike, delivery_id: str) -> Flow[views.DeliveryAnswer]:
        where = job_route(id_of(job), "webhook-deliveries", delivery_id, "redeliver")
        return self.exchange.read(views.DeliveryAnswer, Call("POST", where))

    # Artifacts

    @returns
    def artifact(self, artifact_id: str) -> Flow[views.ArtifactAnswer]:
        return self.exchange.read(views.ArtifactAnswer, Call("GET", artifact_route(artifact_id)))

    @returns
    def artifacts(
        self, *, limit: int = 20, after: str | None = None, tag: str | None = None
    ) -> Flow[views.ArtifactPage]:
        """A page of artifacts, newest first; with `tag`, those that have it."""
        params = query({"limit": limit, "after": after, "tag": tag})
        return self.exchange.read(views.ArtifactPage, Call("GET", "/v1/artifacts", params=params))

    @yields
    def each_artifact(self) -> Stream[views.ArtifactAnswer]:
        return each(lambda after: Operations.artifacts(self, limit=PAGE, after=after))

    @returns
    def delete_artifact(self, artifact_id: str, *, force: bool = False) -> Flow[None]:
        """Remove an artifact; one with tags only with `force`."""
        params = {"force": "true"} if force else {}
        return self.exchange.done(Call("DELETE", artifact_route(artifact_id), params=params))

    @returns
    def change_tags(
        self, artifact_id: str, *, add: Sequence[str] = (), remove: Sequence[str] = ()
    ) -> Flow[views.ArtifactAnswer]:
        """Give tags to an artifact, which leave the model's other artifacts, and take some from it."""
        body = {"add_tags": list(add), "remove_tags": list(remove)}
        call = Call("PATCH", artifact_route(artifact_id), json=body, repeatable=True)
        return self.exchange.read(views.ArtifactAnswer, call)

    @returns
    def registry(
        self, *, model: str | None = None, limit: int = 200, after: str | None = None
    ) -> Flow[views.RegistryPage]:
        """Artifacts by the model that they were made of; `limit` is of artifacts."""
        params = query({"model": model, "limit": limit, "after": after})
        return self.exchange.read(views.RegistryPage, Call("GET", "/v1/registry", params=params))

    @returns
    def push(
        self, artifact_id: str, body: Body, *, idempotency_key: str | None = None
    ) -> Flow[views.PushAnswer]:
        """Push an artifact to the hub: `repo_id`, and what PushOptions has beside it. Retries push once."""
        where = artifact_route(artifact_id, "push")
        call = Call("POST", where, json=plain(body), headers=keyed(idempotency_key))
        return self.exchange.read(views.PushAnswer, call)

    @returns
    def push_state(self, artifact_id: str, push_id: str) -> Flow[views.PushAnswer]:
        """A push as it is now."""
        return self.exchange.read(
            views.PushAnswer, Call("GET", artifact_route(artifact_id, "pushes", push_id))
        )

    @yields
    def follow_push(self, artifact_id: str, push_id: str) -> Stream[views.PushAnswer]:
        """A push now and after each change, until it has ended."""
        return push_changes(self.exchange, artifact_id, push_id)

    @returns
    def link(self, artifact_id: str, path: str, *, expires_in_s: int = 3600) -> Flow[views.LinkAnswer]:
        """A link that reads one file without a key."""
        body = {"path": path, "expires_in_s": expires_in_s}
        call = Call("POST", artifact_route(artifact_id, "links"), json=body, repeatable=True)
        return self.exchange.read(views.LinkAnswer, call)

    @returns
    def download(
        self, artifact_id: str, folder: Path, *, on_bytes: OnBytes = ignore_bytes
    ) -> Flow[views.ArtifactAnswer]:
        """Download an artifact's files to `folder`; each appears only once its SHA-256 is verified.

        An interrupted download is resumed; complete files are skipped.
        """
        artifact = yield from Operations.artifact(self, artifact_id)
        yield from artifact_files(self.exchange, artifact, folder, on_bytes)
        return artifact

    # Datasets

    @returns
    def upload_dataset(
        self, name: str, content: bytes | Path, *, sequence_length: int = 512
    ) -> Flow[views.DatasetAnswer]:
        """Upload a text; the end of `name` says how it is read. A file is sent as it is read."""
        params = query({"name": name, "sequence_length": sequence_length})
        call = Call(
            "POST", "/v1/datasets", params=params, content=content, read_timeout_s=UPLOAD_ANSWER_S,
            headers={"Content-Type": "application/octet-stream"},
        )  # fmt: skip
        return self.exchange.read(views.DatasetAnswer, call)

    @returns
    def dataset(self, dataset_id: str, *, sequence_length: int = 512) -> Flow[views.DatasetAnswer]:
        params = query({"sequence_length": sequence_length})
        return self.exchange.read(views.DatasetAnswer, Call("GET", dataset_route(dataset_id), params=params))

    @returns
    def datasets(
        self, *, limit: int = 20, after: str | None = None, sequence_length: int = 512
    ) -> Flow[views.DatasetPage]:
        """A page of datasets, newest first."""
        params = query({"limit": limit, "after": after, "sequence_length": sequence_length})
        return self.exchange.read(views.DatasetPage, Call("GET", "/v1/datasets", params=params))

    @yields
    def each_dataset(self) -> Stream[views.DatasetAnswer]:
        """Every dataset, newest first."""
        return each(lambda after: Operations.datasets(self, limit=PAGE, after=after))

    @returns
    def delete_dataset(self, dataset_id: str) -> Flow[None]:
        return self.exchange.done(Call("DELETE", dataset_route(dataset_id)))

    # Deployments

    @returns
    def deploy(self, body: Body, *, idempotency_key: str | None = None) -> Flow[views.DeploymentAnswer]:
        call = Call("POST", "/v1/deployments", json=plain(body), headers=keyed(idempotency_key))
        return self.exchange.read(views.DeploymentAnswer, call)

    @returns
    def deployment(self, deployment_id: str) -> Flow[views.DeploymentAnswer]:
        return self.exchange.read(views.DeploymentAnswer, Call("GET", deployment_route(deployment_id)))

    @returns
    def deployments(self, *, limit: int = 20, after: str | None = None) -> Flow[views.DeploymentPage]:
        """A page of deployments, newest first."""
        params = query({"limit": limit, "after": after})
        return self.exchange.read(views.DeploymentPage, Call("GET", "/v1/deployments", params=params))

    @returns
    def server_metrics(self, deployment_id: str, slot: int) -> Flow[str]:
        """The metrics of a deployment's server, as Prometheus reads them."""
        where = route("deployments", deployment_id, "servers", str(slot), "metrics")
        answer = yield from self.exchange.sent(Call("GET", where))
        return str(answer.text)

    @yields
    def each_deployment(self) -> Stream[views.DeploymentAnswer]:
        return each(lambda after: Operations.deployments(self, limit=PAGE, after=after))

    @returns
    def deployment_named(self, name: str) -> Flow[views.DeploymentAnswer]:
        """The deployment of that name, alias or id, unless it is being deleted. Raises NotFound."""
        after: str | None = None
        while True:
            page = yield from Operations.deployments(self, limit=PAGE, after=after)
            for each_one in page.items:
                if name in (each_one.name, each_one.id, *each_one.aliases) and each_one.state != "draining":
                    return each_one
            if page.next is None:
                raise NotFound(
                    f"there is no deployment {name!r}",
                    code="deployment_not_found",
                    remedy="`nibble deployments` lists them",
                )
            after = page.next

    @returns
    def change_deployment(
        self, deployment_id: str, body: Mapping[str, Any], *, revision: int | None = None
    ) -> Flow[views.DeploymentAnswer]:
        """Scale, pause, replace or rename it: `replicas`, `paused`, `artifact`, `aliases` and others.

        With `revision`, that of an answer, PreconditionFailed is raised if another change came since.
        """
        headers = {} if revision is None else {"If-Match": f'"{revision}"'}
        route_of = deployment_route(deployment_id)
        call = Call("PATCH", route_of, json=dict(body), headers=headers, repeatable=revision is None)
        return self.exchange.read(views.DeploymentAnswer, call)

    @returns
    def delete_deployment(self, deployment_id: str, *, wait: bool = False) -> Flow[None]:
        """Delete a deployment: it finishes running requests, then stops. With `wait`, return after that."""
        yield from self.exchange.done(Call("DELETE", deployment_route(deployment_id)))
        if wait:
            yield from deployment_gone(self.exchange, deployment_id)

    @yields
    def follow_deployment(self, deployment_id: str) -> Stream[views.DeploymentAnswer]:
        """Yield the deployment now and after each change, without end."""
        return deployment_changes(self.exchange, deployment_id)

    @returns
    def model(self, name: str) -> Flow[dict[str, Any]]:
        """A deployment as OpenAI's model object; `sampling` is what a chat should start with."""
        return self.exchange.document(Call("GET", route("models", name)))

    @yields
    def chat(self, body: Mapping[str, Any], *, on_wait: OnWait = ignore_seconds) -> Stream[Chunk]:
        """Yield the chunks of a streamed answer; waits for a loading model."""
        return chat_chunks(self.exchange, body, on_wait)

    # The service itself

    @returns
    def workers(self) -> Flow[views.WorkerPage]:
        return self.exchange.read(views.WorkerPage, Call("GET", "/v1/workers"))

    @returns
    def ready(self) -> Flow[bool]:
        """Whether the service accepts jobs; False while it starts or lacks Redis or storage."""
        try:
            answer = yield Send(Call("GET", "/readyz", read_timeout_s=READY_LIMIT_S))
        except httpx.TransportError:
            return False
        return bool(answer.is_success)

    @returns
    def login_link(self) -> Flow[views.LoginLinkAnswer]:
        return self.exchange.read(views.LoginLinkAnswer, Call("POST", "/v1/login-links", repeatable=True))

    @returns
    def collect_garbage(self, *, dry_run: bool = False) -> Flow[views.GarbageAnswer]:
        params = {"dry_run": str(dry_run).lower()}
        call = Call("POST", "/v1/gc", params=params, repeatable=True)
        return self.exchange.read(views.GarbageAnswer, call)

    @returns
    def storage(self) -> Flow[views.StorageAnswer]:
        return self.exchange.read(views.StorageAnswer, Call("GET", "/v1/storage"))

    @returns
    def settings(self) -> Flow[views.SettingPage]:
        """The settings of the API process, for operators; what is secret is masked."""
        return self.exchange.read(views.SettingPage, Call("GET", "/v1/settings"))

    @returns
    def audit(
        self,
        words: str | None = None,
        *,
        key: str | None = None,
        since: datetime | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> Flow[views.AuditPage]:
        """A page of changes and logins, newest first; with `words`, those in which all of them occur."""
        moment = since.isoformat() if since is not None else None
        params = query({"q": words, "key": key, "since": moment, "limit": limit, "after": after})
        return self.exchange.read(views.AuditPage, Call("GET", "/v1/audit", params=params))

    # Access. A key is shown once: if that answer is lost, a retry is refused and names the key.

    @returns
    def create_key(self, body: Mapping[str, Any]) -> Flow[views.NewKeyAnswer]:
        return self.exchange.read(
            views.NewKeyAnswer, Call("POST", "/v1/keys", json=dict(body), headers=keyed(None))
        )

    @returns
    def keys(self, *, tenant: str | None = None) -> Flow[views.KeyPage]:
        return self.exchange.read(views.KeyPage, Call("GET", "/v1/keys", params=query({"tenant": tenant})))

    @returns
    def revoke_key(self, key_id: str) -> Flow[None]:
        return self.exchange.done(Call("DELETE", route("keys", key_id)))

    @returns
    def tenant_limits(self, tenant: str) -> Flow[views.LimitsAnswer]:
        return self.exchange.read(views.LimitsAnswer, Call("GET", route("tenants", tenant, "limits")))

    @returns
    def set_tenant_limits(self, tenant: str, limits: Mapping[str, int]) -> Flow[views.LimitsAnswer]:
        call = Call("PUT", route("tenants", tenant, "limits"), json=dict(limits))
        return self.exchange.read(views.LimitsAnswer, call)

    @returns
    def webhook_secret(self) -> Flow[views.SecretAnswer]:
        return self.exchange.read(views.SecretAnswer, Call("GET", "/v1/webhook-secret"))

    @returns
    def rotate_webhook_secret(self) -> Flow[views.SecretAnswer]:
        return self.exchange.read(views.SecretAnswer, Call("POST", "/v1/webhook-secret/rotate"))


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
