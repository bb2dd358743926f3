"""Columns in turn: the compiled loop, PyTorch's operators, and a slow loop in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.search import cpu
from kernels.search.columns import MOST_COLUMNS, ColumnGrid, round_columns


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid_of(columns: int, rows: int, size: int) -> ColumnGrid:
    group = torch.arange(columns) // size
    groups = int(group[-1]) + 1
    return ColumnGrid(
        values(groups, rows).abs() * 0.2 + 0.1, -(values(groups, rows).abs() * 4).round(), group, 15
    )


def slow(
    target: Tensor, coefficients: Tensor, grid: ColumnGrid, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Column by column, row by row."""
    target, coefficients = target.double(), coefficients.double()
    rounded, change = torch.zeros_like(target), torch.zeros_like(target)
    for row in range(target.shape[1]):
        for n in range(len(target)):
            aim = target[n, row] + coefficients[:n, n] @ change[:n, row]
            scale, low = (at[grid.group[n], row].double() for at in (grid.scale, grid.low))
            rounded[n, row] = (aim / scale).round().clamp(low, low + grid.steps) * scale
            change[n, row] = aim - rounded[n, row] if before is None else rounded[n, row] - before[n, row]
    return rounded, change


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("columns", "rows", "size"), [(128, 64, 32), (37, 35, 16), (8, 3, 8), (1, 1, 1)])
@pytest.mark.parametrize("descends", [True, False])
def test_each_column_sees_what_the_ones_before_it_left(
    compiled: bool, columns: int, rows: int, size: int, descends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled and cpu.library() is None:
        pytest.skip("no C++ compiler")
    if not compiled:
        monkeypatch.setattr(cpu, "round_columns", lambda *_: False)
    target, coefficients, grid = (
        values(columns, rows),
        values(columns, columns) * 0.1,
        grid_of(columns, rows, size),
    )
    before = values(columns, rows, seed=1) if descends else None
    expected = slow(target, coefficients, grid, before)
    # Near a tie float32 may fall to the other side, and columns after it follow.
    same = (
        torch.stack(round_columns(target, coefficients, grid, before)) - torch.stack(expected)
    ).abs() < 1e-4
    assert same.float().mean() > 0.99


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    target, coefficients, grid = values(128, 80), values(128, 128) * 0.1, grid_of(128, 80, 32)
    whole = round_columns(target, coefficients, grid)
    some = ColumnGrid(grid.scale[:, :33].contiguous(), grid.low[:, :33].contiguous(), grid.group, grid.steps)
    alone = round_columns(target[:, :33].contiguous(), coefficients, some)
    assert all(torch.equal(a[:, :33], b) for a, b in zip(whole, alone, strict=True))


def test_what_the_loop_can_not_read_is_refused() -> None:
    grid = grid_of(8, 4, 8)
    with pytest.raises(ValueError, match="neighbours in a row"):
        round_columns(values(8, 4), values(8, 8).T, grid)
    with pytest.raises(ValueError, match="at most 128"):
        round_columns(values(MOST_COLUMNS + 1, 4), values(8, 8), grid)
