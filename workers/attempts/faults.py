"""Decides from an attempt's fault whether and when another attempt may succeed."""

from __future__ import annotations

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from app.core.errors import ChildKilled, DeviceFault, JobFault, NibbleError, Unavailable, WorkerDisk
from app.core.faults.system_faults import STATE_FOLDER, system_fault
from app.core.records.job import Problem
from app.core.settings import Settings

# Storage and hubs come back: many attempts may meet their absence, over 20 minutes.
OUTAGE_ATTEMPTS = 8
PAUSE_FACTOR = 3.0
LONGEST_PAUSE_S = 300.0
# Faults that a child reports and that its job did not cause.
OF_THE_HOST: tuple[type[JobFault], ...] = (DeviceFault, WorkerDisk)

# Errors of Redis while it is down, out of memory or a replica; DISK_FULL begins the one for a full disk.
PASSING = (RedisConnectionError, RedisTimeoutError, OutOfMemoryError, ReadOnlyError)
DISK_FULL = "MISCONF"


def may_pass(fault: RedisError) -> bool:
    """Whether the same write may succeed later."""
    return isinstance(fault, PASSING) or str(fault).startswith(DISK_FULL)


def pause_before_next(fault: NibbleError, attempt: int, settings: Settings) -> float | None:
    """Seconds until the job may go on after the fault; None if it has failed for good.

    An absent storage or hub, a full disk, a lost device, and a process that was killed from outside, say
    nothing about the job: another worker may take it. Memory that ran out, a crash, or a refused model would
    be met again.
    """
    if isinstance(fault, Unavailable):
        most = max(OUTAGE_ATTEMPTS, settings.max_attempts)
    elif isinstance(fault, ChildKilled | DeviceFault | WorkerDisk):
        most = settings.max_attempts
    else:
        return None
    if attempt >= most:
        return None
    return min(LONGEST_PAUSE_S, settings.retry_pause_s * PAUSE_FACTOR ** (attempt - 1))


def reported(problem: Problem) -> JobFault:
    """The fault that the child reported, in the class of its code."""
    kind = next((fault for fault in OF_THE_HOST if fault.code == problem.code), JobFault)
    return kind(problem.message, code=problem.code, remedy=problem.remedy)


def disk_fault(fault: OSError) -> WorkerDisk:
    """A refusal of the system that the worker itself has met."""
    return system_fault(fault, STATE_FOLDER) or WorkerDisk(
        f"the worker could not write or read its own files: {fault}",
        remedy="read the worker's log",
    )
