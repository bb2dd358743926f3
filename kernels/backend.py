"""Which backend computes: chosen once, out loud; asking for an absent one is an error."""

from __future__ import annotations

from dataclasses import dataclass

AUTO = "auto"
TORCH = "torch"  # PyTorch's own operators, on any device


@dataclass(frozen=True)
class Backend:
    """A backend, and why it was chosen."""

    name: str
    reason: str


def select_backend(requested: str) -> Backend:
    """The backend for `requested`: `auto` or a name.

    Raises ValueError for a backend that this installation lacks.
    """
    if requested == AUTO:
        return Backend(TORCH, "the only backend of this installation")
    if requested == TORCH:
        return Backend(TORCH, "asked for")
    raise ValueError(f"kernel backend {requested!r} is not installed; available: {AUTO}, {TORCH}")
