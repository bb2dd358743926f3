from __future__ import annotations

import re
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from app.core.access import limits, login
from app.core.changes import stamps
from app.core.changes.atomic_changes import MAX_COLLISIONS, Script, versioned_update
from app.core.changes.redis_keys import job_key
from app.core.deployments import deployment_store
from app.core.errors import Conflict
from app.core.jobs import job_scripts, label_index
from app.core.outgoing import webhook_messages
from app.core.pushes import push_store
from app.core.storage import tags
from app.core.upkeep import duty

ECHO = Script("return {first, second, key, other}", keys=("key", "other"), args=("first", "second"))
MODULES = (
    *(job_scripts, label_index, deployment_store, webhook_messages, limits, login, stamps, push_store, tags),
    duty,
)
SCRIPTS = [
    pytest.param(script, id=f"{module.__name__.rpartition('.')[2]}-{name}")
    for module in MODULES
    for name, script in vars(module).items()
    if isinstance(script, Script)
]


def test_keys_and_arguments_arrive_under_their_names(redis: Redis) -> None:
    echo = ECHO.on(redis)
    assert echo(second=2, other="o", first="1", key="k") == [b"1", b"2", b"k", b"o"]


def test_an_absent_argument_is_an_empty_text(redis: Redis) -> None:
    assert ECHO.on(redis)(key="k", other="o", first=None, second=0) == [b"", b"0", b"k", b"o"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"key": "k", "other": "o", "first": 1}, r"missing \['second'\], unknown \[\]"),
        (
            {"key": "k", "other": "o", "first": 1, "second": 2, "third": 3},
            r"missing \[\], unknown \['third'\]",
        ),
        ({"first": 1, "second": 2, "kye": "k", "other": "o"}, r"missing \['key'\], unknown \['kye'\]"),
    ],
)
def test_a_missing_or_unknown_name_is_refused(redis: Redis, values: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ECHO.on(redis)(**values)


@pytest.mark.parametrize("fixed", [(), ("first", "second")])
def test_further_keys_are_a_table(redis: Redis, fixed: tuple[str, ...]) -> None:
    script = Script("return {#rest, rest[1], rest[#rest]}", keys=fixed, more_keys="rest").on(redis)
    names = {name: name for name in fixed}
    assert script(**names, rest=["a", "b", "c"]) == [3, b"a", b"c"]
    assert script(**names, rest=[]) == [0]
    many = [str(number) for number in range(20_000)]  # more than Lua can unpack at a time
    assert script(**names, rest=many) == [20_000, b"0", b"19999"]


def test_a_name_that_lua_does_not_know_is_an_error(redis: Redis) -> None:
    with pytest.raises(ResponseError, match="secnod"):
        Script("return secnod", args=("second",)).on(redis)(second=1)


def test_every_script_is_among_those_that_are_checked(repository: Path) -> None:
    sources = [path.read_text() for part in ("app", "workers") for path in (repository / part).rglob("*.py")]
    assert sum(len(re.findall(r"= Script\(", source)) for source in sources) == len(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_uses_each_of_its_names_and_no_position(script: Script) -> None:
    names = [*script.keys, *script.args, *filter(None, [script.more_keys])]
    assert len(set(names)) == len(names)
    assert [name for name in names if not re.search(rf"\b{name}\b", script.body)] == []
    assert not re.search(r"\b(KEYS|ARGV)\b", script.body)


@pytest.mark.parametrize("script", SCRIPTS)
def test_redis_accepts_a_script(redis: Redis, script: Script) -> None:
    assert redis.script_load(script.text)


class Counter:
    """A record that is a number, and writers that are faster."""

    def __init__(self, faster: int) -> None:
        self.value, self.version, self.faster, self.swaps = 0, 1, faster, 0

    def read(self) -> tuple[int, int]:
        seen = self.value, self.version
        if self.faster:
            self.faster -= 1
            self.value, self.version = self.value + 10, self.version + 1
        return seen

    def swap(self, before: int, after: int, version: int) -> bool:
        self.swaps += 1
        if version != self.version:
            return False
        self.value, self.version = after, version + 1
        return True


@pytest.mark.parametrize("faster", [0, 1, 7, MAX_COLLISIONS - 1])
def test_a_change_is_applied_to_what_a_faster_writer_left(faster: int) -> None:
    counter = Counter(faster)
    assert versioned_update("it", counter.read, lambda number: number + 1, counter.swap) == 10 * faster + 1
    assert (counter.value, counter.swaps) == (10 * faster + 1, faster + 1)


def test_a_record_that_always_changes_is_given_up() -> None:
    counter = Counter(MAX_COLLISIONS)
    with pytest.raises(Conflict, match=f"job x was changed {MAX_COLLISIONS} times") as refusal:
        versioned_update("job x", counter.read, lambda number: number + 1, counter.swap)
    assert refusal.value.code == "contended"
    assert counter.value == 10 * MAX_COLLISIONS


def test_what_is_the_same_is_not_written() -> None:
    counter = Counter(0)
    assert versioned_update("it", counter.read, lambda number: number, counter.swap) == 0
    assert (counter.swaps, counter.version) == (0, 1)


def test_a_key_names_its_kind_and_owner() -> None:
    assert job_key("job_1") == "nibble:job:job_1"
