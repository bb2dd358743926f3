"""A real worker process whose jobs are done by the stand-in child."""

from __future__ import annotations

import sys

from app.core.planning.device_profile import NOMINAL
from app.core.settings import Settings
from workers.main import describe_worker, serve

if __name__ == "__main__":
    settings = Settings()
    record = describe_worker("cpu", sys.argv[1])
    if "--measure" not in sys.argv:
        profile = NOMINAL["cpu"].model_copy(update={"assumed": ()})
        record = record.model_copy(update={"profile": profile})
    serve(
        settings,
        str(settings.redis_url),
        record,
        burst=False,
        child_module="tests.integration.stand_in_child",
    )
