"""Sessions of browsers: a link that works once becomes a cookie that stands for an API key.

The key itself is never in a link or a cookie, and a revoked key ends its sessions.
"""

from __future__ import annotations

import secrets
from typing import Any

from redis import Redis

from app.core.changes.atomic_changes import Script
from app.core.changes.redis_keys import login_key, login_used_key, session_key
from app.core.errors import Unauthenticated

LINK_S = 600
SESSION_S = 12 * 3600

# Returns the id of the link's key ('' if there is none), and 1 if it opens a session. A used link returns its
# id once more only, so that nobody can fill the audit log with it.
OPEN = Script(
    keys=("login", "login_used"),
    args=("seconds",),
    body="""
local key_id = redis.call('GETDEL', login)
if not key_id then return {redis.call('GETDEL', login_used) or '', 0} end
redis.call('SET', login_used, key_id, 'EX', seconds)
return {key_id, 1}
""",
)


class LoginLinks:
    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable
        self._open = OPEN.on(redis)

    def new_code(self, key_id: str) -> str:
        """A code that opens one session for the holder of the key."""
        code = secrets.token_urlsafe(32)
        self._redis.set(login_key(code), key_id, ex=LINK_S)
        return code

    def use(self, code: str) -> tuple[str | None, bool]:
        """The id of the code's key, if there is one, and whether it opens a session, which it does once."""
        key_id, is_first = self._open(login=login_key(code), login_used=login_used_key(code), seconds=LINK_S)
        return key_id.decode() or None, bool(is_first)

    def open_session(self, key_id: str) -> str:
        """The value of a new session's cookie."""
        session = secrets.token_urlsafe(32)
        self._redis.set(session_key(session), key_id, ex=SESSION_S)
        return session

    def has_session(self, session: str | None) -> bool:
        """Whether the value of a cookie stands for a session that has not ended."""
        return session is not None and bool(self._redis.exists(session_key(session)))

    def close_session(self, session: str) -> None:
        self._redis.delete(session_key(session))


def session_holder(stored: bytes | None) -> str:
    """The id of a session's API key, from the value in Redis. Raises Unauthenticated if there is none."""
    if stored is None:
        raise Unauthenticated(
            "the session is not known or has ended",
            code="session_unknown",
            remedy="log in again with a link from `nibble login`",
        )
    return stored.decode()
