"""What the client's logic asks of a connection.

The logic itself is written once, as generators that yield effects and are sent the outcomes. The two
connections, one on httpx.Client and one on httpx.AsyncClient, only carry effects out.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

SAFE_TO_REPEAT = frozenset({"GET", "HEAD", "PUT", "DELETE"})


@dataclass(frozen=True)
class Call:
    """One HTTP request."""

    method: str
    route: str
    params: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    read_timeout_s: float | None = None  # None: the client's own
    repeatable: bool | None = None  # None: by method; a POST that carries a key is

    @property
    def is_repeatable(self) -> bool:
        """True if sending it twice does what sending it once does."""
        if self.repeatable is not None:
            return self.repeatable
        return self.method in SAFE_TO_REPEAT or "Idempotency-Key" in self.headers


@dataclass(frozen=True)
class Send:
    """Gives the answer, read to its end."""

    call: Call


@dataclass(frozen=True)
class Open:
    """Gives the answer's head; its body follows piece by piece. Ends what was open before."""

    call: Call
    piece_bytes: int | None = None


@dataclass(frozen=True)
class Read:
    """Gives the next piece of what is open; None at its end."""


@dataclass(frozen=True)
class ReadAll:
    """Reads the rest of what is open, and ends it."""


@dataclass(frozen=True)
class Pause:
    seconds: float


@dataclass(frozen=True)
class RunTask:
    """Gives what `task` returns. It works on files: an event loop must not wait for it."""

    task: Callable[[], Any]


ItemT_co = TypeVar("ItemT_co", covariant=True)


@dataclass(frozen=True)
class Emit(Generic[ItemT_co]):
    """Hands an item to who iterates."""

    item: ItemT_co


Effect = Send | Open | Read | ReadAll | Pause | RunTask
ResultT = TypeVar("ResultT")
ItemT = TypeVar("ItemT")

Flow = Generator[Effect, Any, ResultT]  # gives a result
Stream = Generator[Effect | Emit[ItemT], Any, None]  # gives items


def emitted(flow: Flow[ResultT]) -> Stream[ResultT]:
    """A stream of the flow's one result."""
    yield Emit((yield from flow))
