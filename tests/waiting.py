"""Waiting for something that another thread or process does, and that it may never do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest

STEP_S = 0.02


def wait_until(
    condition: Callable[[], object], limit_s: float = 60, *, failure: Callable[[], object] = lambda: None
) -> None:
    """Return when the condition is true. Fails at the limit, or as soon as `failure` gives a reason."""
    for _ in steps(condition, limit_s, failure):
        time.sleep(STEP_S)


async def until(
    condition: Callable[[], object], limit_s: float = 60, *, failure: Callable[[], object] = lambda: None
) -> None:
    """The same in an event loop."""
    for _ in steps(condition, limit_s, failure):
        await asyncio.sleep(STEP_S)


def steps(condition: Callable[[], object], limit_s: float, failure: Callable[[], object]) -> Iterator[None]:
    """One step for each time that the condition is not true yet."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if reason := failure():
            pytest.fail(f"it will not happen any more: {reason}")
        if time.monotonic() > deadline:
            pytest.fail(f"it did not happen within {limit_s:g} s")
        yield
