"""Sessions of browsers: a link that works once becomes a cookie that stands for an API key.

nibble:login:<digest of the code>       id of the key, for ten minutes, until the link is opened
nibble:session:<digest of the cookie>   id of the key, for twelve hours

The key itself is never in a link or a cookie, and a revoked key ends its sessions.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

from redis import Redis

from app.core.errors import Unauthenticated

LINK_S = 600
SESSION_S = 12 * 3600


class LoginLinks:
    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable

    def new_code(self, key_id: str) -> str:
        """A code that opens one session for the holder of the key."""
        code = secrets.token_urlsafe(32)
        self._redis.set(f"nibble:login:{digest(code)}", key_id, ex=LINK_S)
        return code

    def open_session(self, code: str) -> str:
        """The value of a new session's cookie. A code works once."""
        key_id = self._redis.getdel(f"nibble:login:{digest(code)}")
        if key_id is None:
            raise Unauthenticated(
                "this login link was used already, or is older than ten minutes",
                code="login_link_invalid",
                remedy="make a new one with `nibble login`",
            )
        session = secrets.token_urlsafe(32)
        self._redis.set(session_key(session), key_id, ex=SESSION_S)
        return session

    def key_id_of(self, session: str) -> str:
        """The id of the key that a session stands for."""
        key_id = self._redis.get(session_key(session))
        if key_id is None:
            raise Unauthenticated(
                "the session is not known or has ended",
                code="session_unknown",
                remedy="log in again with a link from `nibble login`",
            )
        return str(key_id.decode())

    def close_session(self, session: str) -> None:
        self._redis.delete(session_key(session))


def session_key(session: str) -> str:
    return f"nibble:session:{digest(session)}"


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
