"""Checks of Redis: version, role, durability and clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from app.commands.checks.check import Check, Status
from app.core.errors import NibbleError

if TYPE_CHECKING:
    from redis import Redis

    from app.core.settings import Settings

LEAST_VERSION = (6, 2)  # has the blocking moves and ranges that the queue uses
FULL = 0.8
SKEW_WARNING_S = 2.0
SKEW_PROBLEM_S = 60.0


def check_redis(settings: Settings) -> list[Check]:
    """Check that Redis answers, then its settings and clock."""
    from redis import Redis
    from redis.exceptions import AuthenticationError, RedisError

    from app.core.redis.redis_server import CERTIFICATE_REMEDY, untrusted_certificate

    url = settings.redis_url or own_url(settings)
    if url is None:
        return [check_program(settings)]
    try:
        with Redis.from_url(url, socket_connect_timeout=3, socket_timeout=3) as redis:
            facts: dict[str, Any] = redis.info()
            return [check_version(facts), *check_settings(facts), check_clock(redis)]
    except AuthenticationError:
        remedy = "correct them in NIBBLE_REDIS_URL: redis://USER:PASSWORD@host:6379/0"
        return [Check("redis", "problem", "it refuses the user or password", remedy)]
    except (RedisError, ValueError) as fault:
        if reason := untrusted_certificate(fault):
            finding = f"its certificate is not trusted: {reason}"
            return [Check("redis", "problem", finding, CERTIFICATE_REMEDY)]
        # The URL is not shown: it may contain a password.
        return [Check("redis", "problem", str(fault), "correct NIBBLE_REDIS_URL, or start that server")]


def own_url(settings: Settings) -> str | None:
    """The address of this machine's own Redis; None unless it runs."""
    from app.core.redis.redis_server import answers, socket_path

    path = socket_path(settings.state_dir / "redis")
    url = f"unix://{path}"
    return url if path.is_socket() and answers(url) else None


def check_program(settings: Settings) -> Check:
    """Check the Redis program that would be started for the state folder."""
    from app.core.redis.redis_programs import find_program

    try:
        program, why = find_program(settings.redis_server, settings.state_dir / "redis")
    except NibbleError as fault:
        return Check("redis", "problem", fault.message, fault.remedy)
    return Check("redis", "ok", f"{program} will be started: {why}")


def check_version(facts: dict[str, Any]) -> Check:
    text = str(facts.get("redis_version", "unknown"))
    finding = f"answers: Redis {text}"
    if "valkey_version" in facts:
        finding = f"answers: Valkey {facts['valkey_version']}"
    version = tuple(int(number) for number in text.split(".")[:2] if number.isdecimal())
    if version < LEAST_VERSION:
        return Check("redis", "problem", finding, "use Redis 6.2 or later, or Valkey")
    if facts.get("role") != "master":
        return Check("redis", "problem", f"{finding}, a replica", "name the primary in NIBBLE_REDIS_URL")
    return Check("redis", "ok", finding)


def check_settings(facts: dict[str, Any]) -> Iterable[Check]:
    yield check_eviction(facts)
    yield check_persistence(facts)


def check_eviction(facts: dict[str, Any]) -> Check:
    """Check that Redis never evicts: jobs would be lost silently."""
    policy, most = str(facts.get("maxmemory_policy")), int(facts.get("maxmemory", 0))
    used = int(facts.get("used_memory", 0))
    if policy != "noeviction":
        status: Status = "problem" if most else "warning"
        limit = "when it is full" if most else "once it has a maxmemory"
        finding = f"maxmemory-policy is {policy}: it drops records {limit}"
        return Check("redis memory", status, finding, "set `maxmemory-policy noeviction`")
    if most and used > FULL * most:
        finding = f"{used / most:.0%} of maxmemory is used"
        return Check("redis memory", "warning", finding, "raise maxmemory, or set NIBBLE_RETENTION_DAYS")
    return Check("redis memory", "ok", "noeviction")


def check_persistence(facts: dict[str, Any]) -> Check:
    name = "redis persistence"
    if not int(facts.get("aof_enabled", 0)):
        finding = "appendonly is off: accepted jobs are lost when it restarts"
        return Check(name, "problem", finding, "set `appendonly yes` and `appendfsync everysec`")
    if facts.get("aof_last_write_status", "ok") != "ok":
        return Check(name, "problem", "its last write to the append-only file failed", "free its disk")
    return Check(name, "ok", "append-only file")


def check_clock(redis: Redis, *, clock: Callable[[], float] = time.time) -> Check:
    """Compare the clocks: links, keys and signatures use this host's, leases that of Redis."""
    before = clock()
    answer: Any = redis.time()
    seconds, microseconds = answer
    skew = (before + clock()) / 2 - (seconds + microseconds / 1e6)
    finding = f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} Redis"
    remedy = "synchronise the clocks of both hosts (chrony, systemd-timesyncd)"
    if abs(skew) >= SKEW_PROBLEM_S:
        return Check("clock", "problem", finding, remedy)
    if abs(skew) >= SKEW_WARNING_S:
        return Check("clock", "warning", finding, remedy)
    return Check("clock", "ok", "agrees with Redis")
