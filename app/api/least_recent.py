"""A bounded dictionary."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LeastRecent(Generic[K, V]):
    """Holds at most `most` values of `most_bytes` in all; drops the least recently used first."""

    def __init__(
        self, most: int, *, most_bytes: int = 0, bytes_of: Callable[[V], int] = lambda value: 0
    ) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._bytes_of = bytes_of
        self._values: OrderedDict[K, V] = OrderedDict()
        self._bytes = 0

    def get(self, key: K) -> V | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        self.drop(key)
        self._values[key] = value
        self._bytes += self._bytes_of(value)
        while len(self._values) > self._most or self._bytes > self._most_bytes:
            self.drop(next(iter(self._values)))

    def drop(self, key: K) -> None:
        value = self._values.pop(key, None)
        if value is not None:
            self._bytes -= self._bytes_of(value)
