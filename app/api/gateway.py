"""Relays inference requests to the servers of a deployment.

find      the deployment by tenant and model, its least loaded replica
ask       if a replica is dead or full before the first byte, another one is tried, once
relay     whole events are passed on as they arrive; if the server dies, an error event ends the stream
leave     a caller's disconnect cancels the request at the server
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

import httpx
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from app.api.metrics import Metrics
from app.api.relay import RelayedEvents, Upstream, lost_events
from app.api.routing import RoutingTable
from app.core.changes.departure import CallerGone, disconnected, unless_gone
from app.core.deployments.deployment import DeploymentState, LiveDeployment, Replica, ReplicaState
from app.core.deployments.deployment_store import DeploymentStore
from app.core.deployments.transitions import awakened
from app.core.errors import MalformedRequest, NibbleError, NotFound, Paused, QueueFull, Unavailable
from app.core.settings import Settings

CONNECT_S = 3.0
KEEPALIVE_S = 4.0  # below the five seconds after which servers close idle connections
SUSPECT_S = 3.0  # how long a replica that refused a connection is asked last
USUAL_LOAD_S = 5.0
MAX_RETRY_AFTER_S = 60
PASSED_ON = ("content-type", "accept", "x-request-id", "anthropic-version", "anthropic-beta")
BUSY = frozenset({429, 503})


class Inquiry(NamedTuple):
    """A request that is being relayed to a server."""

    live: LiveDeployment
    path: str
    body: bytes
    headers: dict[str, str]


class Gateway:
    """Relays requests; one per process. Close it on the event loop that used it."""

    def __init__(
        self, routes: RoutingTable, store: DeploymentStore, settings: Settings, metrics: Metrics
    ) -> None:
        self._routes = routes
        self._store = store
        self._limit = settings.inference_limit
        self._metrics = metrics
        self._in_flight: Counter[str] = Counter()  # by deployment
        self._asked: Counter[str] = Counter()  # by the replica's url
        self._suspects: dict[str, float] = {}
        silence = settings.inference_silence_s
        self._timeout = httpx.Timeout(
            connect=CONNECT_S, read=silence, write=silence, pool=CONNECT_S
        ).as_dict()
        # A transport, not a client: redirects, cookies and proxies are not needed.
        self._http = httpx.AsyncHTTPTransport(
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=256, keepalive_expiry=KEEPALIVE_S
            ),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def answer(self, request: Request, tenant: str) -> Response:
        """The server's answer to a completion request."""
        started = time.perf_counter()
        body = await request.body()
        name = model_of(body)
        live = await self._deployment(tenant, name)
        if name != live.spec.name:  # an alias, which its servers don't know
            body = renamed(body, live.spec.name)
        release = self._admit(live)
        headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
        inquiry = Inquiry(live, request.url.path, body, headers)
        gone = asyncio.create_task(disconnected(request.receive))
        try:
            upstream = await unless_gone(gone, self._begin(inquiry))
        except CallerGone:
            release(499)
            return Response(status_code=499)
        except BaseException as fault:
            gone.cancel()
            release(getattr(fault, "status", 503))
            raise
        self._metrics.first_byte(live.id, time.perf_counter() - started)
        if upstream.is_stream:
            return RelayedEvents(upstream, gone, release, lost_events(request.url.path))
        gone.cancel()
        release(upstream.response.status_code)
        return Response(
            upstream.first, status_code=upstream.response.status_code, headers=upstream.passed_headers()
        )

    async def is_meant(self, request: Request) -> bool:
        """Whether the request names a deployment, so that a server can be asked."""
        try:
            model_of(await request.body())
        except MalformedRequest:
            return False
        return True

    async def _deployment(self, tenant: str, name: str) -> LiveDeployment:
        """The deployment of that name; an unloaded one is started."""
        live = self._routes.find(tenant, name)
        if live is None:
            raise unknown_model(name)
        if live.state is DeploymentState.PAUSED:
            raise Paused(
                f"{name} is paused by its owner", remedy="use another deployment, or resume this one"
            )
        if live.deployment.error is not None:
            error = live.deployment.error
            raise Unavailable(
                f"{name} can't be served: {error.message}", code=error.code, remedy=error.remedy
            )
        self._routes.note_use(live.deployment)
        if live.state in (DeploymentState.DRAINING, DeploymentState.STOPPED):
            await run_in_threadpool(self._store.update, live.id, awakened)
            raise loading(live)
        return live

    def _admit(self, live: LiveDeployment) -> Callable[[int], None]:
        """Count a request that begins; call the result with its status when it ends."""
        if self._in_flight[live.id] >= self._limit:
            self._metrics.inference_ends(live.id, 429)
            raise QueueFull(
                f"{live.spec.name} has {self._limit} requests in progress already",
                code="too_many_requests",
                remedy="ask again in a moment, or let the operator add replicas",
            )
        self._in_flight[live.id] += 1

        def release(status: int) -> None:
            self._in_flight[live.id] -= 1
            self._routes.note_use(live.deployment)
            self._metrics.inference_ends(live.id, status)

        return release

    async def _begin(self, inquiry: Inquiry) -> Upstream:
        """Open an answer, from a second replica if the first one is dead, full or ending."""
        first = self._choose(inquiry.live, avoid=None)
        upstream: Upstream | None = None
        try:
            upstream = await self._ask(first, inquiry)
        except httpx.ReadTimeout as fault:
            raise silent(inquiry.live) from fault
        except httpx.TransportError:
            self._suspects[str(first.url)] = time.monotonic() + SUSPECT_S
        # Read the table again: another replica may have taken the place of the first one.
        live = self._routes.find(inquiry.live.deployment.tenant, inquiry.live.spec.name) or inquiry.live
        if upstream is not None:
            is_last = all(replica.url == first.url for replica in live.ready)
            if upstream.response.status_code not in BUSY or is_last:
                return upstream
            await upstream.close()
        self._metrics.inference_retried(live.id)
        try:
            return await self._ask(self._choose(live, avoid=first.url), inquiry)
        except httpx.TransportError as fault:
            raise lost(live) from fault

    def _choose(self, live: LiveDeployment, *, avoid: str | None) -> Replica:
        """The least loaded replica; the one to avoid only if there is no other."""
        if not live.ready:
            raise loading(live)
        now = time.monotonic()
        self._suspects = {url: until for url, until in self._suspects.items() if until > now}

        def burden(replica: Replica) -> tuple[bool, bool, int]:
            url = str(replica.url)
            reported = replica.running + replica.waiting
            return url == avoid, url in self._suspects, max(reported, self._asked[url])

        return min(live.ready, key=burden)

    async def _ask(self, replica: Replica, inquiry: Inquiry) -> Upstream:
        """Send the request and wait for the first bytes, or for the whole answer if it is not a stream."""
        url = str(replica.url)
        self._asked[url] += 1
        response: httpx.Response | None = None
        try:
            asked = httpx.Request(
                "POST",
                url + inquiry.path,
                content=inquiry.body,
                headers=inquiry.headers,
                extensions={"timeout": self._timeout},
            )
            response = await self._http.handle_async_request(asked)
            chunks = response.aiter_raw()
            is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
            first = await anext(chunks, b"") if is_stream else await response.aread()
        except BaseException:
            self._forget(url)
            if response is not None:
                await response.aclose()
            raise
        upstream = Upstream(response, chunks, first, is_stream=is_stream, on_close=lambda: self._forget(url))
        if not is_stream:
            await upstream.close()
        return upstream

    def _forget(self, url: str) -> None:
        self._asked[url] -= 1
        if self._asked[url] <= 0:
            del self._asked[url]


def model_of(body: bytes) -> str:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as fault:
        raise MalformedRequest(
            "the body is not valid JSON", code="json_invalid", remedy="send application/json"
        ) from fault
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, str):
        raise MalformedRequest(
            "the body has no `model`",
            code="model_missing",
            remedy="set `model` to the name of a deployment; GET /v1/models lists them",
            param="model",
        )
    return model


def renamed(body: bytes, name: str) -> bytes:
    """The body with another `model`."""
    return json.dumps({**json.loads(body), "model": name}).encode()


def unknown_model(name: str) -> NotFound:
    return NotFound(
        f"the model {name[:200]!r} does not exist",
        code="model_not_found",
        remedy="use the name of a deployment; GET /v1/models lists them",
        param="model",
    )


def ask_again(message: str, code: str, seconds: float) -> Unavailable:
    """The error for a deployment without a ready replica; `seconds` becomes Retry-After."""
    retry_after = min(max(1, math.ceil(seconds)), MAX_RETRY_AFTER_S)
    return Unavailable(message, code=code, remedy=f"ask again in {retry_after} s", retry_after_s=retry_after)


def loading(live: LiveDeployment) -> Unavailable:
    """The error of a loading deployment; Retry-After is estimated from its last start."""
    left = live.deployment.load_s or USUAL_LOAD_S
    for replica in live.replicas:
        if replica.state is ReplicaState.LOADING:
            left -= (datetime.now(UTC) - replica.since).total_seconds()
    return ask_again(f"{live.spec.name} is loading", "model_loading", left)


def lost(live: LiveDeployment) -> Unavailable:
    message = f"the server of {live.spec.name} ended; it is being started again"
    return ask_again(message, "replica_lost", live.deployment.load_s or USUAL_LOAD_S)


def silent(live: LiveDeployment) -> NibbleError:
    return Unavailable(
        f"the server of {live.spec.name} sent nothing for too long",
        code="inference_timeout",
        remedy="ask for fewer tokens, or let the operator raise NIBBLE_INFERENCE_SILENCE_S",
    )
