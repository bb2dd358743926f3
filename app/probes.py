"""Probes on their own port, answered by a thread with its own loop, however busy the main loop is."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app.api.operations import metrics, readiness
from app.core.errors import Unavailable
from app.core.settings import Settings

SILENCE_LIMIT_S = 60.0  # well above the longest turn of an overloaded loop, a second or two
STOP_LIMIT_S = 5.0


def probe_socket(settings: Settings) -> socket.socket | None:
    """The bound socket of NIBBLE_PROBE_PORT; None if it is not set. Raises Unavailable if it is taken."""
    if settings.probe_port is None:
        return None
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.probe_port), family=family)
    except OSError as fault:
        raise Unavailable(
            f"can't listen for probes at {settings.host}:{settings.probe_port}: {fault.strerror or fault}",
            code="port_taken",
            remedy="set NIBBLE_PROBE_PORT to a free port, or leave it empty: NIBBLE_PORT also answers probes",
        ) from fault


def probe_app(api: FastAPI, silent_s: Callable[[], float]) -> Starlette:
    """`/healthz`, `/readyz` and `/metrics` of `api`.

    `silent_s`: seconds since the main loop last ran. A hanging loop is reported as 503.
    """

    async def healthy(request: Request) -> Response:
        silence = silent_s()
        if silence < SILENCE_LIMIT_S:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "hangs", "silent_s": round(silence)}, status_code=503)

    def ready(request: Request) -> Response:
        return readiness(api.state.services)

    def measured(request: Request) -> Response:
        return metrics(api.state.services)

    routes = {"/healthz": healthy, "/readyz": ready, "/metrics": measured}
    return Starlette(routes=[Route(path, answer) for path, answer in routes.items()])


class ProbeThread(threading.Thread):
    """Serves `probe_app` at `listener` until it is stopped."""

    def __init__(self, listener: socket.socket, api: FastAPI, silent_s: Callable[[], float]) -> None:
        super().__init__(name="probes", daemon=True)
        self._listener = listener
        config = uvicorn.Config(
            probe_app(api, silent_s),
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        self._server.run(sockets=[self._listener])

    def stop(self) -> None:
        self._server.should_exit = True
        self.join(STOP_LIMIT_S)
