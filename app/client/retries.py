"""When a request is sent again, and after which pause."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from app.core.errors import NibbleError


def say_nothing(fault: NibbleError, seconds: float) -> None:
    """For callers who don't want to hear of pauses."""


@dataclass(frozen=True)
class Retries:
    """Pauses double from `first_s` to `longest_s`, each shortened at random so that clients spread out.

    What the service says in Retry-After comes before that. If it asks for more than `longest_s`, its
    answer is raised at once, with `retry_after_s`.
    """

    attempts: int = 4
    first_s: float = 0.25
    longest_s: float = 15.0
    refused_connections: bool = True  # False: a service that does not run is told of at once
    on_pause: Callable[[NibbleError, float], None] = say_nothing
    draw: Callable[[], float] = random.random

    def pause_s(self, tries: int, retry_after_s: int | None) -> float:
        """The pause after so many tries. More than `longest_s` means: don't wait."""
        if retry_after_s is not None:
            return float(retry_after_s)
        doubled = self.first_s * 2.0 ** (tries - 1)
        return min(self.longest_s, doubled) * (0.5 + self.draw() / 2)


NO_RETRIES = Retries(attempts=1)
