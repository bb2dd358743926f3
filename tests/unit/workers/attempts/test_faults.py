from __future__ import annotations

import pytest
from redis.exceptions import BusyLoadingError, OutOfMemoryError, ReadOnlyError, RedisError, ResponseError

from app.core.errors import ChildKilled, JobFault, ModelRefused, NibbleError, OutOfMemory, Unavailable
from app.core.records.job import Problem
from app.core.settings import Settings
from workers.attempts.faults import disk_fault, may_pass, pause_before_next, reported


def told(code: str) -> JobFault:
    """What a child reports, as its supervisor sees it."""
    return reported(Problem(code=code, message="m", remedy="r"))


@pytest.mark.parametrize(
    ("fault", "attempts"),
    [
        (Unavailable("storage is away"), 8),
        (ChildKilled("signal 9"), 3),
        (told("device_failed"), 3),
        (told("worker_disk"), 3),
        (disk_fault(OSError(28, "No space left on device")), 3),
        (told("out_of_memory"), 1),
        (OutOfMemory("the kernel killed it"), 1),
        (told("target_missed"), 1),
        (told("internal"), 1),
        (JobFault("it crashed", code="child_crashed"), 1),
        (ModelRefused("a pickle"), 1),
    ],
    ids=lambda value: getattr(value, "code", value),
)
def test_what_may_pass_is_tried_again(fault: NibbleError, attempts: int) -> None:
    pauses = [pause_before_next(fault, attempt, Settings(max_attempts=3)) for attempt in range(1, 10)]
    assert [pause is not None for pause in pauses] == [attempt < attempts for attempt in range(1, 10)]


def test_pauses_grow_to_a_limit() -> None:
    settings = Settings(max_attempts=20, retry_pause_s=5)
    pauses = [pause_before_next(ChildKilled("signal 9"), attempt, settings) for attempt in (1, 2, 3, 9)]
    assert pauses == [5, 15, 45, 300]


@pytest.mark.parametrize(
    ("fault", "passes"),
    [
        (BusyLoadingError("Redis is loading the dataset in memory"), True),
        (OutOfMemoryError("command not allowed when used memory > 'maxmemory'"), True),
        (ReadOnlyError("You can't write against a read only replica."), True),
        (ResponseError("MISCONF Errors writing to the AOF file: No space left on device"), True),
        (ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"), False),
    ],
    ids=str,
)
def test_a_redis_that_is_down_or_full_comes_back(fault: RedisError, passes: bool) -> None:
    assert may_pass(fault) is passes
