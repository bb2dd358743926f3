"""Runs the HTTP service under uvicorn until a signal comes."""

from __future__ import annotations

import asyncio
import logging
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api.dependencies import Services
from app.core.errors import NibbleError
from app.core.settings import Settings
from app.core.telemetry.logs import set_up_logs
from app.main import create_app

GRACE_S = 5  # for requests that are being answered when the end comes
HEAD_LIMIT_S = 15.0
TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class PatientProtocol(H11Protocol):
    """Ends connections on which no whole head of a request arrives in time.

    Thousands that send a byte now and then would otherwise use up the process's files. A body that does not
    arrive is `BodyLimit`'s matter; a connection between two requests, uvicorn's.
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
    """Ends long polls and event streams at once when it is told to stop: their callers ask again."""

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        services: Services | None = getattr(self._app.state, "services", None)
        if services is not None:  # else it is still starting
            services.changes.release()
        super().handle_exit(sig, frame)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises NibbleError if the service can't start."""
    set_up_logs(settings)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        host=settings.host,
        port=settings.port,
        log_config=None,  # as all other loggers
        access_log=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    logging.getLogger("uvicorn.error").addFilter(
        lambda record: refusal_of(app) is None or not record.getMessage().startswith("Traceback")
    )
    try:
        ApiServer(app, config).run()
    finally:
        refusal = refusal_of(app)
        if refusal is not None:
            raise refusal from None  # in place of uvicorn's exit code


def refusal_of(app: FastAPI) -> NibbleError | None:
    """Why the service could not start, where its operator can change it."""
    return getattr(app.state, "refusal", None)
