"""Takes up one push in a process of its own, which the test kills or measures."""

from __future__ import annotations

import sys
from pathlib import Path

from app.core.access.hub_tokens import HubTokens
from app.core.jobs.job_store import JobStore
from app.core.pushes.push_store import PushStore
from app.core.pushes.pusher import Pusher
from app.core.redis.redis_server import connect
from app.core.settings import Settings
from app.core.storage.object_store import ObjectStore


def pusher(settings: Settings, hold_s: float) -> Pusher:
    redis = connect(str(settings.redis_url))
    tokens, objects = HubTokens(redis, settings), ObjectStore(settings.object_store_url)
    return Pusher(PushStore(redis), tokens, JobStore(redis), objects, settings, hold_s=hold_s)


if __name__ == "__main__":
    assert pusher(Settings(), float(sys.argv[1])).push_due()
    status = Path("/proc/self/status").read_text()
    sys.stdout.write(status.partition("VmHWM:")[2].split()[0])  # kB, the peak since this program began
