"""The inverse of a Cholesky factor: exact, the same on any number of threads, refused where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.quantization.inverse_triangle import LEAF, inverse_lower


def moment(channels: int) -> Tensor:
    """Of channels of very different sizes, fewer tokens than channels, and a little on the diagonal."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(channels // 2 + 1, channels, generator=generator) * torch.logspace(-2, 2, channels)
    product = x.T @ x / len(x)
    product.diagonal().add_(0.01 * product.diagonal().mean())
    return product


@pytest.mark.parametrize("channels", [1, 64, 128, 129, 200, 576])
def test_it_is_the_inverse_of_the_factor(channels: int) -> None:
    matrix = moment(channels)
    inverse, failed = inverse_lower(matrix)
    expected = torch.linalg.inv(torch.linalg.cholesky(matrix.double()))
    assert not bool(failed)
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("row", [0, LEAF["cpu"] + 3, 500])
def test_a_matrix_that_is_not_positive_definite_is_told(row: int) -> None:
    matrix = moment(576)
    matrix[row, row] *= -1
    assert int(inverse_lower(matrix)[1]) > 0


def test_threads_do_not_change_a_bit() -> None:
    matrix, before = moment(576), torch.get_num_threads()
    inverses = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        inverses.append(inverse_lower(matrix)[0])
    torch.set_num_threads(before)
    assert all(torch.equal(each, inverses[0]) for each in inverses)
