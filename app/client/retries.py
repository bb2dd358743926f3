"""The policy of retries and of the pauses between them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from app.core.errors import NibbleError


def say_nothing(fault: NibbleError, seconds: float) -> None:
    """The default `on_pause`: does nothing."""


@dataclass(frozen=True)
class Retries:
    """Pauses double from `first_s` to `longest_s`, each shortened at random so that clients spread out.

    A Retry-After header overrides them. If it exceeds `longest_s`, the error is raised at once, with
    `retry_after_s`.
    """

    attempts: int = 4
    first_s: float = 0.25
    longest_s: float = 15.0
    refused_connections: bool = True  # False: fail fast when the connection is refused
    on_pause: Callable[[NibbleError, float], None] = say_nothing
    draw: Callable[[], float] = random.random

    def pause_s(self, tries: int, retry_after_s: int | None) -> float:
        """The pause after so many tries; if it exceeds `longest_s`, the caller does not retry."""
        if retry_after_s is not None:
            return float(retry_after_s)
        doubled = self.first_s * 2.0 ** (tries - 1)
        return min(self.longest_s, doubled) * (0.5 + self.draw() / 2)


NO_RETRIES = Retries(attempts=1)
