"""The audit log: one entry for each changing request and each login, refused ones included.

nibble:audit:<tenant>    stream, capped
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from redis import Redis

from app.core.records.specs import Kept

MAX_ENTRIES = 100_000


class AuditEntry(Kept):
    id: str
    at: datetime
    key_id: str
    request_id: str
    method: str
    path: str
    status: int
    detail: str = ""  # what a path does not say: which tag moved from where to where


class AuditLog:
    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable

    def append(self, tenant: str, fields: dict[str, str | int]) -> None:
        self._redis.xadd(audit_key(tenant), fields, maxlen=MAX_ENTRIES, approximate=True)

    def page(self, tenant: str, *, limit: int, before: str | None) -> list[AuditEntry]:
        """Entries before the id `before`, newest first."""
        if before is not None and not before.replace("-", "").strip("0"):
            return []  # nothing is before the first id, and Redis refuses the question
        newest = "+" if before is None else f"({before}"
        entries = self._redis.xrevrange(audit_key(tenant), newest, "-", count=limit)
        return [
            AuditEntry(
                id=entry_id.decode(),
                at=datetime.fromtimestamp(int(entry_id.partition(b"-")[0]) / 1000, UTC),
                **{name.decode(): value.decode() for name, value in fields.items()},
            )
            for entry_id, fields in entries
        ]


def audit_key(tenant: str) -> str:
    return f"nibble:audit:{tenant}"
