"""The loss at the output of an error e of the weights: e H e^T."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels.search import cpu, cuda

# Columns; H is symmetric, so only its blocks on and above the diagonal are multiplied.
BLOCK = {"cpu": 256, "cuda": 1024}
WIDE = 512  # channels from which on products are what the search takes its time for


def row_losses(errors: Tensor, moment: Tensor) -> Tensor:
    """float32 (rows,): e H e^T of each row e of `errors` (rows, C); products run in the dtype of both."""
    total, block = torch.zeros(errors.shape[0], device=errors.device), BLOCK[errors.device.type]
    with matrix_units(errors.device):
        for start in range(0, errors.shape[1], block):
            columns = slice(start, start + block)
            product = errors[:, columns] @ moment[columns, columns]
            if start:
                product.addmm_(errors[:, :start], moment[:start, columns], alpha=2)
            add_row_dots(product, errors[:, columns], total)
    return total


def has_bfloat16_products(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 much faster than float32."""
    return device.type == "cuda" or (device.type == "cpu" and cpu.has_bfloat16_products())


def quick_dtype(device: torch.device, channels: int) -> torch.dtype:
    """The dtype of products with H whose results are summed over many rows.

    bfloat16 on CPUs with matrix units for it: rounding moves the loss of a row by 1e-4, sums by less.
    """
    return torch.bfloat16 if device.type == "cpu" and channels >= WIDE and cpu.has_tiles() else torch.float32


def quick_row_losses(errors: Tensor, moment: Tensor) -> Tensor:
    """row_losses of float32 errors and H, in quick_dtype."""
    dtype = quick_dtype(errors.device, errors.shape[1])
    return row_losses(errors.to(dtype), moment.to(dtype))


def add_row_dots(product: Tensor, errors: Tensor, total: Tensor) -> None:
    """total += the sum of products of each row; `product` is used up."""
    if product.is_cuda and product.numel() and cuda.can_dot(product, errors):
        cuda.add_row_dots(product, errors, total)
    elif product.device.type == "cpu" and cpu.can_dot(product, errors):
        cpu.add_row_dots(product, errors, total)
    else:
        total += product.mul_(errors).sum(dim=1, dtype=torch.float32)


@contextmanager
def matrix_units(device: torch.device) -> Iterator[None]:
    """float32 products on a GPU run in tf32: its ten bits of fraction move a loss by less than 0.1 %."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
