"""The audit log: one entry for each changing request and each login, refused ones included.

nibble:audit:<tenant>    stream, capped
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from redis import Redis

from app.core.records.specs import Frozen, Kept

MAX_ENTRIES = 100_000
BATCH = 1000  # entries read at a time while few match

Fields = dict[bytes, bytes]


class AuditEntry(Kept):
    id: str
    at: datetime
    key_id: str
    request_id: str
    method: str
    path: str
    status: int
    detail: str = ""  # what a path does not say: which tag moved from where to where


class AuditFilter(Frozen):
    """Which entries are asked for; the empty one takes all."""

    key: str = ""  # the id of a key
    words: tuple[str, ...] = ()  # lower case; each in the method, the path, the detail or the request's id
    since: datetime | None = None
    is_refused: bool = False  # only what was answered with 4xx or 5xx

    @property
    def takes_all(self) -> bool:
        return not (self.key or self.words or self.is_refused)

    @property
    def oldest(self) -> str:
        """The id at which reading ends."""
        return "-" if self.since is None else str(max(0, int(self.since.timestamp() * 1000)))

    def takes(self, fields: Fields) -> bool:
        if self.key and fields[b"key_id"] != self.key.encode():
            return False
        if self.is_refused and int(fields[b"status"]) < 400:
            return False
        searched = b" ".join(fields.get(name, b"") for name in (b"method", b"path", b"detail", b"request_id"))
        return all(word.encode() in searched.lower() for word in self.words)


class AuditLog:
    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable

    def append(self, tenant: str, fields: dict[str, str | int]) -> None:
        self._redis.xadd(audit_key(tenant), fields, maxlen=MAX_ENTRIES, approximate=True)

    def page(
        self, tenant: str, *, limit: int, before: str | None, chosen: AuditFilter | None = None
    ) -> list[AuditEntry]:
        """Entries that `chosen` takes, before the id `before`, newest first."""
        chosen = chosen or AuditFilter()
        if before is not None and not before.replace("-", "").strip("0"):
            return []  # nothing is before the first id, and Redis refuses the question
        taken: list[AuditEntry] = []
        count = limit if chosen.takes_all else BATCH
        for entry_id, fields in self._newest_first(tenant, before, chosen.oldest, count):
            if chosen.takes(fields):
                taken.append(entry_of(entry_id, fields))
                if len(taken) == limit:
                    break
        return taken

    def _newest_first(
        self, tenant: str, before: str | None, oldest: str, count: int
    ) -> Iterator[tuple[bytes, Fields]]:
        newest = "+" if before is None else f"({before}"
        while batch := self._redis.xrevrange(audit_key(tenant), newest, oldest, count=count):
            yield from batch
            newest = f"({batch[-1][0].decode()}"


def entry_of(entry_id: bytes, fields: Fields) -> AuditEntry:
    return AuditEntry(
        id=entry_id.decode(),
        at=datetime.fromtimestamp(int(entry_id.partition(b"-")[0]) / 1000, UTC),
        **{name.decode(): value.decode() for name, value in fields.items()},
    )


def audit_key(tenant: str) -> str:
    return f"nibble:audit:{tenant}"
