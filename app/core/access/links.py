"""Temporary links to one file of an artifact that need no key. Storage that can signs its own.

The secret is in Redis, so every API process accepts the links of the others.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from typing import Any
from urllib.parse import quote, urlencode

from redis import Redis

from app.core.errors import Forbidden

SECRET = "nibble:link-secret"  # noqa: S105  # the name of the key in Redis


class LinkSigner:
    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable

    def path(self, artifact_id: str, path: str, *, lasts_s: int) -> str:
        """The path of a link to the file, valid for `lasts_s` seconds."""
        expires = int(time.time()) + lasts_s
        signed = {"expires": expires, "signature": self._signature(artifact_id, path, expires)}
        return f"/v1/downloads/{artifact_id}/{quote(path)}?{urlencode(signed)}"

    def check(self, artifact_id: str, path: str, *, expires: int, signature: str) -> None:
        """Raise Forbidden unless the signature is valid and has not expired."""
        expected = self._signature(artifact_id, path, expires)
        if not hmac.compare_digest(expected.encode(), signature.encode()) or expires < time.time():
            raise Forbidden(
                "the link has expired or was changed",
                code="link_invalid",
                remedy="make a new one with POST /v1/artifacts/{id}/links",
            )

    def _signature(self, artifact_id: str, path: str, expires: int) -> str:
        self._redis.set(SECRET, secrets.token_bytes(32), nx=True)
        message = f"{artifact_id}\n{path}\n{expires}".encode()
        return hmac.new(self._redis.get(SECRET), message, hashlib.sha256).hexdigest()
