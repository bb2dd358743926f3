"""PyTorch's float32 products on AMD's processors with AVX-512: at twice the rate, as exact.

PyTorch multiplies float32 with MKL, which uses half of a vector on processors that are not Intel's. oneDNN
uses all of it, and PyTorch asks oneDNN where bfloat16 may be used inside. oneDNN does that on matrix units
only: without them products stay float32, of which this makes sure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kernels.cpu.native_library import TILES_NEED, VECTORS_NEED, processor

NEEDED = VECTORS_NEED | {"avx512_bf16"}
CHECKED = 192  # rows and columns of a product that shows how exact they are
EXACT = 1e-5  # of the largest value, from float64's: float32 has 1e-6, bfloat16 5e-3


def use_whole_vectors(device: torch.device) -> bool:
    """Let float32 products of this process use all of AVX-512; whether they do.

    For a process that computes on a CPU: `torch.get_float32_matmul_precision` raises RuntimeError afterwards.
    """
    model, features = processor()
    if device.type != "cpu" or "AMD" not in model or not features >= NEEDED or features >= TILES_NEED:
        return False
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # of a class that replaces the module
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    if products_are_exact():
        return True
    matmul.fp32_precision = before
    return False


@contextmanager
def usual_products() -> Iterator[None]:
    """Products inside are MKL's again: oneDNN keeps memory for every shape, and text that grows has many."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # of a class that replaces the module
    before = matmul.fp32_precision
    matmul.fp32_precision = "none"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def products_are_exact() -> bool:
    """Whether PyTorch's float32 products have the digits of float32."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2, CHECKED, CHECKED, generator=generator) for _ in range(2))
    expected = left.double() @ right.double()
    sums = torch.stack([torch.zeros(CHECKED, CHECKED).addmm_(a, b) for a, b in zip(left, right, strict=True)])
    return all(
        bool((product.double() - expected).abs().amax() <= EXACT * expected.abs().amax())
        for product in (left @ right, sums)
    )
