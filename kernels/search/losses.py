"""What an error of the weights costs at the output: e H e^T."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels.search import cuda

BLOCK = 1024  # columns; H is symmetric, so only its blocks on and above the diagonal are multiplied


def row_losses(errors: Tensor, moment: Tensor) -> Tensor:
    """float32 (rows,): e H e^T of each row e of `errors` (rows, C); products run in the dtype of both."""
    total = torch.zeros(errors.shape[0], device=errors.device)
    with matrix_units(errors.device):
        for start in range(0, errors.shape[1], BLOCK):
            columns = slice(start, start + BLOCK)
            product = errors[:, columns] @ moment[columns, columns]
            if start:
                product.addmm_(errors[:, :start], moment[:start, columns], alpha=2)
            add_row_dots(product, errors[:, columns], total)
    return total


def add_row_dots(product: Tensor, errors: Tensor, total: Tensor) -> None:
    """total += the sum of products of each row; `product` is used up."""
    if product.is_cuda and product.numel() and cuda.can_dot(product, errors):
        cuda.add_row_dots(product, errors, total)
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
