"""The effects that the client's logic asks a connection to perform.

The logic is written once, as generators that yield effects and receive their outcomes. Two connections
perform them, one on httpx.Client and one on httpx.AsyncClient.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

SAFE_TO_REPEAT = frozenset({"GET", "HEAD", "PUT", "DELETE"})


@dataclass(frozen=True)
class Call:
    """One HTTP request."""

    method: str
    route: str
    params: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    content: bytes | Path | None = None  # of a file that is sent as it is read, or all of it
    headers: Mapping[str, str] = field(default_factory=dict)
    read_timeout_s: float | None = None  # None: the client's own
    repeatable: bool | None = None  # None: decided by method and Idempotency-Key

    @property
    def is_repeatable(self) -> bool:
        """Whether the request may be sent twice with the effect of one."""
        if self.repeatable is not None:
            return self.repeatable
        return self.method in SAFE_TO_REPEAT or "Idempotency-Key" in self.headers


@dataclass(frozen=True)
class Send:
    """Returns the whole answer."""

    call: Call


@dataclass(frozen=True)
class Open:
    """Returns the answer's head, with its body left to read in chunks. Closes the previous answer."""

    call: Call
    chunk_bytes: int | None = None


@dataclass(frozen=True)
class Read:
    """Returns the open answer's next chunk; None at its end."""


@dataclass(frozen=True)
class ReadAll:
    """Reads the rest of the open answer."""


@dataclass(frozen=True)
class Pause:
    seconds: float


@dataclass(frozen=True)
class RunTask:
    """Returns the result of `task`, which works on files and runs off the event loop."""

    task: Callable[[], Any]


ItemT_co = TypeVar("ItemT_co", covariant=True)


@dataclass(frozen=True)
class Emit(Generic[ItemT_co]):
    """Yields an item to the caller."""

    item: ItemT_co


Effect = Send | Open | Read | ReadAll | Pause | RunTask
ResultT = TypeVar("ResultT")
ItemT = TypeVar("ItemT")

Flow = Generator[Effect, Any, ResultT]  # returns a result
Stream = Generator[Effect | Emit[ItemT], Any, None]  # yields items


def emitted(flow: Flow[ResultT]) -> Stream[ResultT]:
    """A stream of the flow's one result."""
    yield Emit((yield from flow))
