"""Runs the HTTP service under uvicorn until a signal comes."""

from __future__ import annotations

from types import FrameType

import uvicorn
from fastapi import FastAPI

from app.api.dependencies import Services
from app.core.logs import set_up_logs
from app.core.settings import Settings
from app.main import create_app

GRACE_S = 5  # for requests that are being answered when the end comes


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
    """Serve until SIGTERM or SIGINT."""
    set_up_logs(settings)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,  # as all other loggers
        access_log=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    ApiServer(app, config).run()
