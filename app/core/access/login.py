"""Sessions of browsers: a link that works once becomes a cookie that stands for an API key.

nibble:login:<digest of the code>        id of the key, for ten minutes, until the link is opened
nibble:login-used:<digest of the code>   the same, from then on until the link is opened again
nibble:session:<digest of the cookie>    id of the key, for twelve hours

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

# KEYS: login, login-used. ARGV: seconds. Gives whose link it is or was ('' if nobody's), and 1 if it opens a
# session. Only the first repetition is known as one: who found a link can't fill the audit log with it.
OPEN = """
local key_id = redis.call('GETDEL', KEYS[1])
if not key_id then return {redis.call('GETDEL', KEYS[2]) or '', 0} end
redis.call('SET', KEYS[2], key_id, 'EX', ARGV[1])
return {key_id, 1}
"""


class LoginLinks:
    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable
        self._open = self._redis.register_script(OPEN)

    def new_code(self, key_id: str) -> str:
        """A code that opens one session for the holder of the key."""
        code = secrets.token_urlsafe(32)
        self._redis.set(f"nibble:login:{digest(code)}", key_id, ex=LINK_S)
        return code

    def use(self, code: str) -> tuple[str | None, bool]:
        """The id of the key whose code this is, if known, and whether it opens a session: it does once."""
        names = [f"nibble:login:{digest(code)}", f"nibble:login-used:{digest(code)}"]
        key_id, is_first = self._open(keys=names, args=[LINK_S])
        return key_id.decode() or None, bool(is_first)

    def open_session(self, key_id: str) -> str:
        """The value of a new session's cookie."""
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
