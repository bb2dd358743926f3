"""PyTorch's setting that kernels/cpu/float_products.py changes for a whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def restored() -> Iterator[None]:
    """What is set inside ends with it."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # of a class that replaces the module
    before = matmul.fp32_precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
