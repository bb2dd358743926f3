"""Runs the HTTP service under uvicorn until a signal comes."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api.services import Services
from app.core.errors import NibbleError
from app.core.settings import Settings
from app.core.telemetry.logs import set_up_logs
from app.main import create_app
from app.probes import ProbeThread, probe_socket

GRACE_S = 5  # grace for running requests at shutdown
HEAD_LIMIT_S = 15.0
ACCEPTED_AT_ONCE = 32  # new connections per turn of the loop
TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class PatientProtocol(H11Protocol):
    """Closes connections whose request head does not arrive in time.

    Otherwise thousands of slow connections could use up the process's file descriptors. `BodyLimit` handles
    slow bodies, uvicorn idle connections between requests.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    @property
    def _awaits_head(self) -> bool:
        # None until the first request, whatever its annotation says.
        return self.cycle is None or self.cycle.response_complete  # type: ignore[redundant-expr]

    def _watch_head(self) -> None:
        if not self._awaits_head:
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_LIMIT_S, self._end_if_late)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end_if_late(self) -> None:
        self._deadline = None
        if self._awaits_head and not self.transport.is_closing():
            self.transport.write(TOO_LATE)
            self.transport.close()


class ApiServer(uvicorn.Server):
    """Accepts many connections per turn, answers probes, and ends waiting requests at shutdown.

    Clients of long polls and event streams reconnect.
    """

    def __init__(self, app: FastAPI, config: uvicorn.Config, probes: socket.socket | None = None) -> None:
        super().__init__(config)
        self._app = app
        self._turn_at = time.monotonic()
        self._probes = ProbeThread(probes, app, self.silent_s) if probes is not None else None

    def silent_s(self) -> float:
        """Seconds since the main event loop last ran."""
        return time.monotonic() - self._turn_at

    async def on_tick(self, counter: int) -> bool:
        self._turn_at = time.monotonic()
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        await self._listen_wider()
        if self._probes is not None:
            self._probes.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._probes is not None:
            await asyncio.to_thread(self._probes.stop)
        await super().shutdown(sockets)

    async def _listen_wider(self) -> None:
        """Listen on several duplicated descriptors of each socket.

        libuv (1.45 and later, below uvloop) accepts one connection for each descriptor and turn of the loop.
        A turn handles all pending requests, so with one descriptor a new connection would wait behind many
        busy ones.
        """
        loop = asyncio.get_running_loop()
        protocol = partial(PatientProtocol, self.config, self.server_state, self.lifespan.state)
        for listener in [each for server in self.servers for each in server.sockets]:
            for _ in range(ACCEPTED_AT_ONCE - 1):
                again = socket.socket(fileno=os.dup(listener.fileno()))
                server = await loop.create_server(protocol, sock=again, backlog=self.config.backlog)
                self.servers.append(server)

    @property
    def refusal(self) -> NibbleError | None:
        """The reason why the service could not start, if the operator can fix it."""
        return getattr(self._app.state, "refusal", None)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        services: Services | None = getattr(self._app.state, "services", None)
        if services is not None:  # else it is still starting
            services.changes.release()
        super().handle_exit(sig, frame)


def api_server(settings: Settings) -> ApiServer:
    """The service, ready to run. Raises Unavailable if NIBBLE_PROBE_PORT is taken."""
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        host=settings.host,
        port=settings.port,
        log_config=None,  # like all other loggers
        access_log=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    return ApiServer(app, config, probe_socket(settings))


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises NibbleError if the service can't start."""
    set_up_logs(settings)
    server = api_server(settings)
    logging.getLogger("uvicorn.error").addFilter(
        lambda record: server.refusal is None or not record.getMessage().startswith("Traceback")
    )
    try:
        server.run()
    finally:
        if server.refusal is not None:
            raise server.refusal from None  # in place of uvicorn's exit code
