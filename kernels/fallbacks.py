"""Operators that fell back to PyTorch on a device with kernels of ours: logged once, and recorded."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

# By operator and reason, in the order in which they were met. A process runs one job, or serves one model.
MET: dict[tuple[str, str], None] = {}


def note(operator: str, reason: str) -> None:
    """A warning in the log, the first time."""
    if (operator, reason) not in MET:
        MET[operator, reason] = None
        logger.warning("%s runs in PyTorch instead of its kernel: %s", operator, reason)


def noted() -> tuple[str, ...]:
    """A sentence for each, for reports."""
    return tuple(f"{operator} ran in PyTorch instead of its kernel: {reason}" for operator, reason in MET)
