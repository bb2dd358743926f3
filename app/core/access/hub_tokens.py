"""Hub tokens that callers send with a job or a push: encrypted, and for as long as they are needed.

nibble:hub-token:<owner>    the token of a job or push, encrypted, with an expiry

The key of the encryption is the operator's, or a file of the state folder that API and workers of one host
share: what Redis writes to its disk says nothing without it. A token is deleted when its owner has ended.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cached_property
from typing import Any

from cryptography.fernet import Fernet, InvalidToken
from pydantic import SecretStr
from redis import Redis

from app.core.access.api_keys import kept_key
from app.core.changes.redis_keys import hub_token_key
from app.core.errors import InvalidRequest
from app.core.settings import Settings

KEPT_S = 31 * 24 * 3600  # a job may wait in the queue for 30 days
KEY_FILE = "secret-key"
AGAIN = "submit it again with the token: nothing keeps one longer than its job needs it"


class HubTokens:
    """Keeps tokens by their owner: the id of a job or of a push."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable
        self._settings = settings

    def keep(self, owner: str, token: SecretStr) -> None:
        sealed = self._cipher.encrypt(token.get_secret_value().encode())
        self._redis.set(hub_token_key(owner), sealed, ex=KEPT_S)

    def of(self, owner: str) -> SecretStr:
        """The token that was kept for the owner.

        Raises InvalidRequest if it is gone, or was encrypted with another key than this process has.
        """
        sealed = self._redis.get(hub_token_key(owner))
        if sealed is None:
            raise InvalidRequest(
                f"the hub token of {owner} is gone", code="hub_token_missing", remedy=AGAIN, param="hub_token"
            )
        try:
            return SecretStr(self._cipher.decrypt(sealed).decode())
        except InvalidToken as fault:
            raise InvalidRequest(
                f"the hub token of {owner} was encrypted with another key than this host has",
                code="hub_token_unreadable",
                remedy="let the operator set NIBBLE_SECRET_KEY to the same value for API and workers, then "
                "submit it again with the token",
                param="hub_token",
            ) from fault

    def hand_over(self, owner: str, to: str) -> None:
        """Keep an owner's token, if it is still there, for another one as well."""
        sealed = self._redis.get(hub_token_key(owner))
        if sealed is not None:
            self._redis.set(hub_token_key(to), sealed, ex=KEPT_S)

    def forget(self, owner: str) -> None:
        self._redis.delete(hub_token_key(owner))

    @cached_property
    def _cipher(self) -> Fernet:
        configured = self._settings.secret_key
        secret = (
            configured.get_secret_value()
            if configured is not None
            else kept_key(self._settings.state_dir / KEY_FILE)
        )
        return Fernet(base64.urlsafe_b64encode(hashlib.sha256(secret.encode()).digest()))
