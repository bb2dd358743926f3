from __future__ import annotations

import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis

from app.core.access.api_keys import (
    KEY,
    KEY_FILE,
    KeyStore,
    Principal,
    Scope,
    bootstrap_key,
    kept_key,
    key_id,
    new_key,
)
from app.core.access.authentication import Authenticator, Credential
from app.core.access.limits import TenantLimits
from app.core.errors import Forbidden, InvalidRequest, Unauthenticated
from app.core.settings import Settings

Authenticate = Callable[[str], Principal]


@pytest.fixture
def keys(redis: Redis) -> KeyStore:
    return KeyStore(redis)


@pytest.fixture
def authenticate(redis: Redis, keys: KeyStore, tmp_path: Path) -> Authenticate:
    limits = TenantLimits(redis, Settings(state_dir=tmp_path))
    authenticator = Authenticator(redis, keys, limits)
    return lambda key: authenticator.holder(Credential.of_key(key)).principal


def test_a_registered_key_is_recognised_and_not_kept(
    keys: KeyStore, redis: Redis, authenticate: Authenticate
) -> None:
    key = new_key()
    keys.register(key, tenant="t", scopes=frozenset({Scope.JOBS_READ}))
    assert authenticate(key) == Principal(key_id=key_id(key), tenant="t", scopes=frozenset({Scope.JOBS_READ}))
    secret = key.rpartition("_")[2]
    kept = [redis.get(name) for name in redis.scan_iter(_type="STRING")]
    assert kept
    assert all(secret.encode() not in value for value in kept)


def test_keys_have_256_random_bits() -> None:
    assert KEY.fullmatch(new_key())
    assert len(bytes.fromhex(new_key().rpartition("_")[2])) == 32
    assert new_key() != new_key()


@pytest.mark.parametrize("other", ["", "nib_", "nib_0000000000000000_" + "0" * 64, "Bearer x"])
def test_other_keys_are_refused(keys: KeyStore, other: str, authenticate: Authenticate) -> None:
    keys.register(new_key(), tenant="t", scopes=frozenset())
    with pytest.raises(Unauthenticated):
        authenticate(other)


def test_the_right_id_with_a_wrong_secret_is_refused(keys: KeyStore, authenticate: Authenticate) -> None:
    key = new_key()
    keys.register(key, tenant="t", scopes=frozenset())
    forged = key.rpartition("_")[0] + "_" + new_key().rpartition("_")[2]
    assert key_id(forged) == key_id(key)
    with pytest.raises(Unauthenticated):
        authenticate(forged)


def test_admin_implies_the_scopes_of_a_tenant_and_no_other_does() -> None:
    admin = Principal(key_id="k", tenant="t", scopes=frozenset({Scope.ADMIN}))
    reader = Principal(key_id="k", tenant="t", scopes=frozenset({Scope.JOBS_READ}))
    for scope in set(Scope) - {Scope.OPERATOR}:
        admin.require(scope)
    with pytest.raises(Forbidden, match="operator"):
        admin.require(Scope.OPERATOR)
    with pytest.raises(Forbidden, match="jobs:write"):
        reader.require(Scope.JOBS_WRITE)


def test_the_operators_key_is_admin(keys: KeyStore, tmp_path: Path, authenticate: Authenticate) -> None:
    bootstrap_key(Settings(state_dir=tmp_path, bootstrap_api_key="x" * 24), keys)
    assert authenticate("x" * 24).allows(Scope.ADMIN)
    assert not (tmp_path / KEY_FILE).exists()


@pytest.mark.parametrize("key", ["short", "has spaces " * 4, "nön-ascii" * 4])
def test_a_weak_bootstrap_key_is_refused(keys: KeyStore, tmp_path: Path, key: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        bootstrap_key(Settings(state_dir=tmp_path, bootstrap_api_key=key), keys)
    assert key not in refusal.value.message


def test_a_key_is_made_once_and_kept_privately(
    keys: KeyStore, redis: Redis, tmp_path: Path, authenticate: Authenticate
) -> None:
    settings = Settings(state_dir=tmp_path)
    bootstrap_key(settings, keys)
    key = (tmp_path / KEY_FILE).read_text().strip()
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600
    redis.flushall()
    bootstrap_key(settings, keys)
    assert authenticate(key).tenant == "default"
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]


@pytest.mark.parametrize("given", ["x" * 24, None])
def test_a_revoked_first_key_does_not_come_back_with_a_restart(
    keys: KeyStore,
    tmp_path: Path,
    given: str | None,
    caplog: pytest.LogCaptureFixture,
    authenticate: Authenticate,
) -> None:
    settings = Settings(state_dir=tmp_path, bootstrap_api_key=given)
    bootstrap_key(settings, keys)
    key = given or (tmp_path / KEY_FILE).read_text().strip()
    keys.revoke(key_id(key), tenant=None)
    keys.restore(bootstrap_key(settings, keys))
    with pytest.raises(Unauthenticated):
        authenticate(key)
    assert "was revoked" in caplog.text
    assert key not in caplog.text


def test_processes_that_start_together_agree_on_one_key(tmp_path: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(kept_key(tmp_path / KEY_FILE))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
