"""The CPU's kernels of a weight, for their tests."""

from __future__ import annotations

import pytest
import torch

from kernels.backend import Kernel, select_backend
from kernels.product import LinearProduct
from kernels.weight import PackedWeight

CPU = torch.device("cpu")
BACKENDS = ["amx", "vector", "aten", "torch"]


def problem_of(weight: PackedWeight, dtype: torch.dtype) -> LinearProduct:
    return LinearProduct.of(weight, dtype, CPU)


def kernel_of(name: str, weight: PackedWeight, dtype: torch.dtype) -> Kernel:
    """The backend's kernel; skips where this machine or the backend can't."""
    try:
        selection = select_backend(problem_of(weight, dtype), name)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    return selection.backend.prepare(weight, dtype, CPU)
