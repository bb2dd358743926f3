"""The HTTP service: `create_app(settings)` builds it, its lifespan owns every connection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from fastapi import FastAPI

from app.api import (
    artifacts,
    audit,
    dashboard,
    deployments,
    downloads,
    errors,
    estimates,
    events,
    inference,
    jobs,
    keys,
    operations,
    sessions,
    storage,
    tenants,
    webhooks,
    workers,
)
from app.api.audit import AuditTrail
from app.api.description import describe
from app.api.methods import HeadAsGet
from app.api.metrics import Metrics
from app.api.middleware import BodyLimit, RequestRecord
from app.api.origin import OriginGuard
from app.api.polled import PolledAnswers
from app.api.services import Services
from app.core.access.api_keys import ApiKey, bootstrap_key
from app.core.errors import NibbleError
from app.core.outgoing.address_guard import OutgoingGuard
from app.core.outgoing.webhook_sender import WebhookSender, WebhookThread
from app.core.redis.redis_server import connect, resolve_redis, wait_for_redis
from app.core.settings import Settings, make_folder
from app.core.storage.reuse import package_version
from app.core.telemetry.tracing import Tracer
from app.core.upkeep.janitor import Janitor, Repeated

# Matched in this order: inference, the route most sensitive to latency, comes first.
ROUTES = (
    *(inference, jobs, events, webhooks, estimates, artifacts, downloads, workers, deployments),
    *(keys, tenants, audit, sessions, storage, operations),
)


def create_app(settings: Settings) -> FastAPI:
    """Build the application; its connections open when its lifespan begins."""
    metrics, tracer = Metrics(), Tracer(settings.otlp_endpoint, "nibble-api")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with ExitStack() as stack:
            # In this thread, not a pool's: an embedded Redis dies with the thread that started it.
            try:
                app.state.services = services = open_services(settings, metrics, stack)
            except NibbleError as fault:
                app.state.refusal = fault  # the server's to tell
                raise
            yield
            await services.gateway.close()
            await services.stamps.close()
        tracer.close()

    app = FastAPI(
        title="Nibble",
        summary="Quantizes language models.",
        version=package_version(),
        lifespan=lifespan,
        docs_url=None,  # the interactive pages load scripts from other hosts
        redoc_url=None,
    )
    errors.install(app)
    for module in ROUTES:
        app.include_router(module.router)
    dashboard.install(app)
    describe(app)
    app.add_middleware(AuditTrail)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(PolledAnswers, routes=[route for module in ROUTES for route in module.router.routes])
    app.add_middleware(OriginGuard, hosts=settings.accepted_hosts)
    app.add_middleware(HeadAsGet)
    app.add_middleware(RequestRecord, metrics=metrics, tracer=tracer)
    return app


def open_services(settings: Settings, metrics: Metrics, stack: ExitStack) -> Services:
    """Open every connection; `stack` closes them in reverse order."""
    make_folder(settings.state_dir)
    server = stack.enter_context(resolve_redis(settings))
    redis = connect(server.url)
    stack.callback(redis.close)
    wait_for_redis(redis)
    services = Services(settings, redis, server.url, metrics)
    first_key = bootstrap_key(settings, services.keys)
    metrics.observe_occupancy(lambda: operations.occupancy(services))
    start_threads(services, first_key, stack)
    return services


def start_threads(services: Services, first_key: ApiKey, stack: ExitStack) -> None:
    services.changes.start()
    stack.callback(services.changes.stop)
    services.routes.refresh()
    services.routes.start()
    stack.callback(services.routes.stop)
    settings = services.settings
    janitor = Janitor(
        services.jobs,
        services.queue,
        services.objects,
        services.outcome,
        max_attempts=settings.max_attempts,
        on_step=services.metrics.janitor_step,
    )
    sender = WebhookSender(
        services.deliveries,
        services.webhook_secrets,
        OutgoingGuard(settings.outgoing_networks),
        on_outcome=services.metrics.webhook_outcome,
    )
    threads = (
        Repeated("janitor", janitor.sweep, settings.janitor_interval_s),
        Repeated("turns", services.turns.sweep, settings.janitor_interval_s),
        # Otherwise a Redis that lost its data would refuse every key until the next start.
        Repeated("first key", lambda: services.keys.restore(first_key), settings.janitor_interval_s),
        Repeated("garbage", services.garbage.collect, settings.gc_interval_s),
        WebhookThread(sender),
    )
    for thread in threads:
        thread.start()
        stack.callback(thread.stop)
