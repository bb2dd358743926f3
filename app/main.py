"""The HTTP service: `create_app(settings)` builds it, its lifespan owns every connection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager, suppress

from fastapi import Depends, FastAPI
from redis.exceptions import RedisError
from starlette.middleware.cors import CORSMiddleware

from app.api import (
    artifacts,
    audit,
    dashboard,
    datasets,
    deployments,
    downloads,
    errors,
    estimates,
    events,
    inference,
    jobs,
    keys,
    operations,
    recommendations,
    service_settings,
    sessions,
    sources,
    storage,
    tenants,
    versions,
    webhooks,
    workers,
)
from app.api.audit import AuditTrail
from app.api.description import INTRODUCTION, describe
from app.api.methods import HeadAsGet
from app.api.metrics import Metrics
from app.api.middleware import BodyLimit, RequestRecord
from app.api.origin import OriginGuard
from app.api.polled import PolledAnswers
from app.api.query_parameters import refuse_unknown_parameters
from app.api.services import Services
from app.core.access.api_keys import ApiKey, bootstrap_key
from app.core.errors import NibbleError
from app.core.outgoing.address_guard import OutgoingGuard
from app.core.outgoing.due_thread import DueThread
from app.core.outgoing.webhook_sender import PARALLEL, WebhookSender
from app.core.pushes.pusher import Pusher
from app.core.redis.redis_server import connect, resolve_redis, wait_for_redis
from app.core.settings import Settings, make_folder
from app.core.telemetry.tracing import Destination, Tracer
from app.core.telemetry.version import package_version
from app.core.upkeep.duty import Duty
from app.core.upkeep.janitor import Janitor, Repeated

# Matched in this order: inference, the route most sensitive to latency, comes first.
ROUTES = (
    *(inference, jobs, events, webhooks, estimates, recommendations, artifacts, versions, downloads),
    *(datasets, sources),
    *(workers, deployments, keys, tenants, audit, sessions, storage, service_settings, operations),
)


def create_app(settings: Settings) -> FastAPI:
    """Build the application; its connections open when its lifespan begins."""
    metrics, tracer = Metrics(), Tracer(Destination.of(settings, "nibble-api", package_version()))

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
        **INTRODUCTION,
        version=package_version(),
        generate_unique_id_function=lambda route: route.name,  # what generated clients call their methods
        lifespan=lifespan,
        docs_url=None,  # /docs is the dashboard's: the framework's pages load scripts from other hosts
        redoc_url=None,
    )
    errors.install(app)
    for module in ROUTES:
        checks = [] if module is inference else [Depends(refuse_unknown_parameters)]
        app.include_router(module.router, dependencies=checks)
    dashboard.install(app)
    describe(app)
    app.add_middleware(AuditTrail)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(PolledAnswers, routes=[route for module in ROUTES for route in module.router.routes])
    app.add_middleware(OriginGuard, hosts=settings.accepted_hosts, origins=settings.cors_origins)
    app.add_middleware(HeadAsGet)
    if settings.cors_origins:  # without cookies: sessions are for the service's own pages
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
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
    pusher = Pusher(services.pushes, services.hub_tokens, services.jobs, services.objects, settings)
    works: dict[str, tuple[Callable[[], object], float]] = {
        "janitor": (janitor.sweep, settings.janitor_interval_s),
        "turns": (services.turns.sweep, settings.janitor_interval_s),
        "garbage": (services.garbage.collect, settings.gc_interval_s),
    }
    duties = {name: Duty(services.redis, name, interval_s) for name, (_, interval_s) in works.items()}
    threads: tuple[Repeated | DueThread, ...] = (
        *(Repeated(name, duties[name].doing(work), interval_s) for name, (work, interval_s) in works.items()),
        # Otherwise a Redis that lost its data would refuse every key until the next start.
        Repeated("first key", lambda: services.keys.restore(first_key), settings.janitor_interval_s),
        DueThread("webhooks", sender.send_due, parallel=PARALLEL),
        DueThread("pushes", pusher.push_due, parallel=1),
    )
    stack.callback(leave_all, duties.values())
    for thread in threads:
        thread.start()
        stack.callback(thread.stop)
    stack.callback(pusher.stopping.set)  # before its thread is waited for


def leave_all(duties: Iterable[Duty]) -> None:
    """Let other processes have the duties at once; without Redis they expire."""
    for duty in duties:
        with suppress(RedisError):
            duty.leave()
