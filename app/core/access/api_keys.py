"""API keys: `nib_<id>_<secret>`, kept as SHA-256, with scopes and a tenant.

    nibble:key:<key id>         the key's record as JSON
    nibble:keys                 set of the ids
    nibble:keys:revoked         set of the ids of keys that were revoked
    nibble:key-used:<key id>    when it was used last, to the minute

The secret has 256 random bits, so a plain digest resists guessing: a slow hash would add nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import re
import secrets
import time
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import SecretStr
from redis import Redis

from app.core.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unauthenticated
from app.core.records.forms import Form
from app.core.records.specs import Frozen, Kept
from app.core.settings import Settings

log = logging.getLogger(__name__)

KEY = re.compile(r"nib_([0-9a-f]{16})_[0-9a-f]{64}")
MIN_BOOTSTRAP_LENGTH = 24
DEFAULT_TENANT = "default"
KEY_FILE = "api-key"
KEYS = "nibble:keys"
REVOKED = "nibble:keys:revoked"
USE_STEP_S = 60.0  # resolution of a key's last use

TenantName = Annotated[
    str,
    Form(r"^[a-z0-9][a-z0-9_-]{0,62}$", "a tenant's name: lower-case letters, digits, - and _, at most 63"),
]


class Scope(StrEnum):
    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    ARTIFACTS_READ = "artifacts:read"
    ARTIFACTS_WRITE = "artifacts:write"
    DEPLOYMENTS_READ = "deployments:read"
    DEPLOYMENTS_WRITE = "deployments:write"
    INFERENCE = "inference"
    ADMIN = "admin"  # all of its tenant: implies the scopes above, and manages the tenant's keys
    OPERATOR = "operator"  # of the service: manages the keys of every tenant


class ApiKey(Kept):
    """The stored record of a key: enough to recognise it, not to use it."""

    id: str
    tenant: str
    scopes: frozenset[Scope]
    sha256: str
    name: str = ""
    created_at: datetime
    expires_at: datetime | None = None
    last_used_at: datetime | None = None  # filled when keys are listed

    @property
    def expires_at_s(self) -> float:
        """By time.time(); infinite for a key that does not expire."""
        return self.expires_at.timestamp() if self.expires_at is not None else math.inf

    @property
    def has_expired(self) -> bool:
        return self.expires_at is not None and datetime.now(UTC) >= self.expires_at


class Principal(Frozen):
    """The caller: its tenant, and what it may do with the tenant's resources."""

    key_id: str
    tenant: str
    scopes: frozenset[Scope]

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or (Scope.ADMIN in self.scopes and scope is not Scope.OPERATOR)

    def require(self, scope: Scope) -> None:
        if not self.allows(scope):
            raise Forbidden(
                f"the key {self.key_id} lacks the scope {scope}",
                code="scope_missing",
                remedy=f"use a key with {scope}",
            )


def new_key(known_id: str | None = None) -> str:
    """A fresh key, of this id if one is fixed. It is shown once; only its digest is kept."""
    return f"nib_{known_id or secrets.token_hex(8)}_{secrets.token_hex(32)}"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def key_id(key: str) -> str:
    """The public id of a key; for a key chosen by the operator, from its digest."""
    parts = KEY.fullmatch(key)
    return parts[1] if parts is not None else f"own-{digest(key)[:16]}"


class KeyStore:
    """The API keys in Redis."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable
        self._noted: dict[str, float] = {}  # key id -> when its use was written by this process

    def register(
        self,
        key: str,
        *,
        tenant: str,
        scopes: frozenset[Scope],
        name: str = "",
        expires_at: datetime | None = None,
    ) -> ApiKey:
        """Accept a new key from now on. Raises Conflict if there is one with its id."""
        record = ApiKey(
            id=key_id(key),
            tenant=tenant,
            scopes=scopes,
            sha256=digest(key),
            name=name,
            created_at=datetime.now(UTC),
            expires_at=expires_at,
        )
        if not self.keep(record, only_new=True):
            raise Conflict(
                f"the key {record.id} was made before, and a key is shown once",
                code="key_made_before",
                remedy=f"if that answer was lost, revoke {record.id} and make another key",
            )
        return record

    def keep(self, record: ApiKey, *, only_new: bool = False) -> bool:
        """Write the record; False if `only_new` and there is one already."""
        self._redis.sadd(KEYS, record.id)
        return bool(self._redis.set(record_key(record.id), record.model_dump_json(), nx=only_new))

    def holder(self, known_id: str) -> Principal:
        """The holder of the key with this id, for a login link that was made with the key."""
        return self.admitted(parsed_record(self._redis.get(record_key(known_id))))

    def admitted(self, record: ApiKey) -> Principal:
        """The holder of the key; notes its use. Raises Unauthenticated for an expired key."""
        if record.has_expired:
            raise Unauthenticated(
                f"the API key {record.id} has expired",
                code="api_key_expired",
                remedy="ask the operator for a new key (nibble keys create)",
            )
        self._note_use(record.id)
        return Principal(key_id=record.id, tenant=record.tenant, scopes=record.scopes)

    def list(self, tenant: str | None) -> list[ApiKey]:
        """The keys of a tenant, or of all tenants, oldest first."""
        ids = sorted(member.decode() for member in self._redis.smembers(KEYS))
        records = self._redis.mget([record_key(key_id) for key_id in ids]) if ids else []
        used = self._redis.mget([use_key(key_id) for key_id in ids]) if ids else []
        keys = []
        for record, moment in zip(records, used, strict=True):
            if record is None:
                continue
            last = datetime.fromtimestamp(float(moment), UTC) if moment is not None else None
            keys.append(ApiKey.model_validate_json(record).model_copy(update={"last_used_at": last}))
        chosen = [key for key in keys if tenant is None or key.tenant == tenant]
        return sorted(chosen, key=lambda key: key.created_at)

    def revoke(self, known_id: str, *, tenant: str | None) -> ApiKey:
        """Refuse the key from now on. Raises NotFound for an unknown key, and for one of another tenant."""
        record = self._read(known_id)
        if record is None or (tenant is not None and record.tenant != tenant):
            raise NotFound(
                f"there is no key {known_id[:64]}", code="key_not_found", remedy="list keys with GET /v1/keys"
            )
        self._redis.sadd(REVOKED, known_id)  # before the record is deleted: `restore` checks this last
        self._redis.delete(record_key(known_id), use_key(known_id))
        self._redis.srem(KEYS, known_id)
        return record

    def was_revoked(self, known_id: str) -> bool:
        return bool(self._redis.sismember(REVOKED, known_id))

    def restore(self, record: ApiKey) -> None:
        """Accept a key again that Redis has lost, unless it was revoked."""
        if self.was_revoked(record.id) or not self.keep(record, only_new=True):
            return
        if self.was_revoked(record.id):  # at this very moment
            self._redis.delete(record_key(record.id))
            return
        log.warning("redis has lost its keys; %s is accepted again", record.id)

    def _read(self, known_id: str) -> ApiKey | None:
        record = self._redis.get(record_key(known_id))
        return ApiKey.model_validate_json(record) if record is not None else None

    def _note_use(self, known_id: str) -> None:
        """Record the time of the key's last use, to the minute."""
        if time.monotonic() - self._noted.get(known_id, -USE_STEP_S) >= USE_STEP_S:
            self._noted[known_id] = time.monotonic()
            self._redis.set(use_key(known_id), time.time())


def parsed_record(stored: bytes | None) -> ApiKey:
    """The record of a key. Raises Unauthenticated if there is none."""
    if stored is None:
        raise unknown_key()
    return ApiKey.model_validate_json(stored)


def recognised(key: str, stored: bytes | None) -> ApiKey:
    """The record `stored` under the key's id, if it is the key's. Raises Unauthenticated if not."""
    record = ApiKey.model_validate_json(stored) if stored is not None else None
    # Compared even without a record, so that timing reveals nothing about ids.
    if not hmac.compare_digest(digest(key), record.sha256 if record is not None else "-" * 64):
        raise unknown_key()
    assert record is not None
    return record


def record_key(known_id: str) -> str:
    return f"nibble:key:{known_id}"


def use_key(known_id: str) -> str:
    return f"nibble:key-used:{known_id}"


def unknown_key() -> Unauthenticated:
    return Unauthenticated(
        "the API key is not known",
        code="api_key_unknown",
        remedy="send `Authorization: Bearer <key>` with a key of this service",
    )


def bootstrap_key(settings: Settings, keys: KeyStore) -> ApiKey:
    """Register the first admin key: the operator's, else one that is created once and stored in a file."""
    configured = settings.bootstrap_api_key
    key = checked_bootstrap(configured) if configured is not None else kept_key(settings.state_dir / KEY_FILE)
    record = ApiKey(
        id=key_id(key),
        tenant=DEFAULT_TENANT,
        scopes=frozenset({Scope.ADMIN, Scope.OPERATOR}),
        sha256=digest(key),
        name="first key",
        created_at=datetime.now(UTC),
    )
    if keys.was_revoked(record.id):
        origin = "NIBBLE_BOOTSTRAP_API_KEY" if configured is not None else settings.state_dir / KEY_FILE
        log.warning("the key in %s was revoked and stays so; change or remove it to have another one", origin)
    else:
        keys.keep(record)
    return record


def checked_bootstrap(configured: SecretStr) -> str:
    key = configured.get_secret_value()
    if len(key) < MIN_BOOTSTRAP_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidRequest(
            f"NIBBLE_BOOTSTRAP_API_KEY has {len(key)} characters; it needs at least {MIN_BOOTSTRAP_LENGTH}, "
            "printable ASCII without spaces",
            code="bootstrap_key_weak",
            remedy="use the output of: openssl rand -hex 32",
        )
    return key


def kept_key(path: Path) -> str:
    """The key in the file at `path`, which is created with mode 0600 if there is none."""
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
