"""A count with its noun."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """`1 server`, `2 servers`, `no servers`."""
    return f"1 {noun}" if count == 1 else f"{count or 'no'} {noun}s"
