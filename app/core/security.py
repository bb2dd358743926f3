"""API keys: `nib_<id>_<secret>`, kept as SHA-256, with scopes and a tenant.

    nibble:key:<key id>     the key's record as JSON

The secret has 256 random bits, so a plain digest resists guessing: a slow hash would add nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from redis import Redis

from app.core.errors import Forbidden, InvalidRequest, Unauthenticated
from app.core.settings import Settings
from app.core.specs import Frozen

KEY = re.compile(r"nib_([0-9a-f]{16})_[0-9a-f]{64}")
MIN_BOOTSTRAP_LENGTH = 24
DEFAULT_TENANT = "default"
KEY_FILE = "api-key"


class Scope(StrEnum):
    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    ARTIFACTS_READ = "artifacts:read"
    ARTIFACTS_WRITE = "artifacts:write"
    ADMIN = "admin"  # implies the others


class ApiKey(Frozen):
    """What is kept of a key: enough to recognise it, not to use it."""

    id: str
    tenant: str
    scopes: frozenset[Scope]
    sha256: str
    created_at: datetime


class Principal(Frozen):
    """Who calls: the tenant whose resources are seen, and what may be done with them."""

    key_id: str
    tenant: str
    scopes: frozenset[Scope]

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def require(self, scope: Scope) -> None:
        if not self.allows(scope):
            raise Forbidden(
                f"the key {self.key_id} lacks the scope {scope}",
                code="scope_missing",
                remedy=f"use a key with {scope}",
            )


def new_key() -> str:
    """A fresh key. It is shown once; only its digest is kept."""
    return f"nib_{secrets.token_hex(8)}_{secrets.token_hex(32)}"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def key_id(key: str) -> str:
    """The public part of a key. A key of the operator's own making gets one from its digest."""
    parts = KEY.fullmatch(key)
    return parts[1] if parts is not None else f"own-{digest(key)[:16]}"


class KeyStore:
    """The known API keys, in Redis."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable

    def register(self, key: str, *, tenant: str, scopes: frozenset[Scope]) -> ApiKey:
        """Accept `key` from now on."""
        record = ApiKey(
            id=key_id(key), tenant=tenant, scopes=scopes, sha256=digest(key), created_at=datetime.now(UTC)
        )
        self._redis.set(f"nibble:key:{record.id}", record.model_dump_json())
        return record

    def authenticate(self, key: str) -> Principal:
        """Whose key this is. Raises Unauthenticated for an unknown one."""
        found = self._redis.get(f"nibble:key:{key_id(key)}")
        record = ApiKey.model_validate_json(found) if found is not None else None
        # Compared also when there is no record, so that the time tells nothing about ids.
        if not hmac.compare_digest(digest(key), record.sha256 if record is not None else "-" * 64):
            raise Unauthenticated(
                "the API key is not known",
                code="api_key_unknown",
                remedy="send `Authorization: Bearer <key>` with a key of this service",
            )
        assert record is not None
        return Principal(key_id=record.id, tenant=record.tenant, scopes=record.scopes)


def bootstrap_key(settings: Settings, keys: KeyStore) -> None:
    """Make sure that an admin key is known: the operator's, else one that is made once and kept in a file."""
    given = settings.bootstrap_api_key
    key = checked_bootstrap(given) if given is not None else kept_key(settings.state_dir / KEY_FILE)
    keys.register(key, tenant=DEFAULT_TENANT, scopes=frozenset({Scope.ADMIN}))


def checked_bootstrap(given: SecretStr) -> str:
    key = given.get_secret_value()
    if len(key) < MIN_BOOTSTRAP_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidRequest(
            f"NIBBLE_BOOTSTRAP_API_KEY has {len(key)} characters; it needs at least {MIN_BOOTSTRAP_LENGTH}, "
            "printable ASCII without spaces",
            code="bootstrap_key_weak",
            remedy="use the output of: openssl rand -hex 32",
        )
    return key


def kept_key(path: Path) -> str:
    """The key in the file at `path`, made with mode 0600 if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(new_key() + "\n")
    try:
        # A link, not a rename: of several processes that start together, the first one's key stays.
        os.link(fresh, path)
    except FileExistsError:
        pass
    finally:
        fresh.unlink()
    return path.read_text().strip()
