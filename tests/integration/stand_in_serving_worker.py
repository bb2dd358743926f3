"""A real worker of the queue `serve` whose servers are stand-ins."""

from __future__ import annotations

import logging
import signal
import sys
import threading

from app.core.settings import Settings
from workers.replicas.replica_supervisor import describe, serve

if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel("WARNING")
    settings, shutdown = Settings(), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: shutdown.set())
    serve(
        settings,
        str(settings.redis_url),
        describe(sys.argv[2] if len(sys.argv) > 2 else "cpu", sys.argv[1]),
        shutdown,
        server_module="tests.integration.stand_in_server",
    )
