"""Runs the routes under uvicorn until SIGTERM, then lets running requests end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial

import uvicorn
from starlette.applications import Starlette

from workers.serving.served_model import ServedModel

log = logging.getLogger(__name__)

POLL_S = 0.05
LAST_FRAMES_S = 2  # for what is written when the engine has ended


class InferenceServer(uvicorn.Server):
    """Leaves signals to `serve`: uvicorn would close connections before their answers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that the port is known and taken before the model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, or asyncio does not switch Nagle's algorithm off: it would hold tokens back for 40 ms.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, port))
    return bound


async def serve(
    app: Starlette, served: ServedModel, bound: socket.socket, drain_s: float, ready: Callable[[int], None]
) -> None:
    """Run until the engine fails, or until a signal and then the end of running requests or of `drain_s`."""
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=LAST_FRAMES_S
    )
    server = InferenceServer(config)
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    served.bind(loop)
    served.engine.on_failure = partial(loop.call_soon_threadsafe, stopping.set)
    served.engine.start()
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    while not server.started and not serving.done():
        await asyncio.sleep(POLL_S)
    ready(bound.getsockname()[1])
    waiting = asyncio.create_task(stopping.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    await drain(served, drain_s)
    server.should_exit = True
    await serving


async def drain(served: ServedModel, drain_s: float) -> None:
    """New requests get 503 from now on; those that run may end."""
    log.info("draining for up to %g s", drain_s)
    served.engine.drain()
    deadline = asyncio.get_running_loop().time() + drain_s
    while not served.engine.idle and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(POLL_S)
    served.engine.abandon("the server is shutting down")
    await asyncio.sleep(POLL_S)
