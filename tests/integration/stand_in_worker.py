"""A real worker process whose jobs are done by the stand-in child."""

from __future__ import annotations

import sys

from app.core.settings import Settings
from workers.main import describe_worker, serve

if __name__ == "__main__":
    settings = Settings()
    record = describe_worker("cpu", sys.argv[1])
    serve(
        settings,
        str(settings.redis_url),
        record,
        burst=False,
        child_module="tests.integration.stand_in_child",
    )
