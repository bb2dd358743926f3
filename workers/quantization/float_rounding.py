"""One folded linear to numbers with an exponent: the scale of each group, then nearest or GPTQ rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from kernels.search import losses
from workers.modeling.quantized_weight import QuantizedWeight
from workers.quantization.float_grids import FloatGrid, float_grid, neighbour_scales
from workers.quantization.gptq import blocks, inverse_factor
from workers.quantization.grid import grouped_view

# Of a group's scale, relative to that of the whole range: smaller ones cut off the largest weights.
FACTORS = {"plain": (0.95, 0.9, 0.85, 0.8, 0.75), "e4m3": (1.1, 0.9, 0.8, 0.7, 0.6), "e8m0": (2.0, 0.5)}


def search_scales_of_groups(
    weight: Tensor, moment: Tensor, scheme: Scheme, grid: FloatGrid, dtype: torch.dtype
) -> tuple[FloatGrid, Tensor, Tensor]:
    """The grid with the best scale of each group, and the loss per row before and after.

    Groups are compared by their own block of H; rows that lose by what groups have in common stay as they
    were. weight: (rows, C) float32; moment: (C, C).
    """
    grouped = grouped_view(weight, scheme)
    own = group_moments(moment, grouped.shape[1])
    best, least = grid, group_losses(grid.nearest(grouped) - grouped, own, scheme)
    for factor in FACTORS[scheme.kind.scales]:
        other = neighbour_scales(grid, scheme, dtype, factor)
        loss = group_losses(other.nearest(grouped) - grouped, own, scheme)
        better = (loss < least)[..., None]
        best = FloatGrid(torch.where(better, other.scale, best.scale), grid.bits, grid.divisor)
        least = torch.minimum(loss, least)
    before, after = (
        losses.quick_row_losses((each.nearest(grouped) - grouped).view_as(weight), moment)
        for each in (grid, best)
    )
    worse = of_blocks(after - before, scheme) > 0
    scale = torch.where(worse[:, None, None], grid.scale, best.scale)
    return FloatGrid(scale, grid.bits, grid.divisor), before, torch.where(worse, before, after)


def group_moments(moment: Tensor, groups: int) -> Tensor:
    """(groups, group_size, group_size): the blocks of H on its diagonal."""
    size = len(moment) // groups
    return moment.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def group_losses(errors: Tensor, moments: Tensor, scheme: Scheme) -> Tensor:
    """(rows, groups): e H e^T of each group by itself; of rows that share scales their sum."""
    product = torch.bmm(errors.transpose(0, 1), moments).transpose(0, 1)
    return of_blocks((product * errors).sum(dim=2), scheme)


def of_blocks(values: Tensor, scheme: Scheme) -> Tensor:
    """Values by row (rows, ...), each replaced by the sum over the rows that share its scale."""
    rows = scheme.kind.block_rows
    if rows == 1:
        return values
    blocks_of_rows = values.view(-1, rows, *values.shape[1:])
    return blocks_of_rows.sum(dim=1, keepdim=True).expand_as(blocks_of_rows).reshape(values.shape)


def spread_errors(weight: Tensor, grid: FloatGrid, moment: Tensor) -> tuple[Tensor, float]:
    """GPTQ on a fixed grid: the weights (rows, C) to round to nearest, and the damping.

    Columns are visited by descending diagonal of H, as for integers; each column's error is spread over those
    that are not rounded yet. Raises RecipeUnsupported if H can't be made positive definite.
    """
    order = moment.diagonal().argsort(descending=True, stable=True)
    dead = (moment.diagonal() <= 0)[order]
    ordered = moment[order][:, order]
    ordered.diagonal()[dead] = 1.0
    factor, damping = inverse_factor(ordered)
    scale = grid.scale.squeeze(-1).repeat_interleave(len(order) // grid.scale.shape[-2], dim=1)
    scales, values = scale.T[order].contiguous(), weight.T[order].contiguous()
    values[dead] = 0.0
    rounded = torch.empty_like(values)
    for block in blocks(len(values)):
        errors = torch.empty_like(values[block])
        for column in range(block.start, block.stop):
            column_grid = FloatGrid(scales[column], grid.bits)
            rounded[column] = column_grid.nearest(values[column])
            error = (values[column] - rounded[column]) / factor[column, column]
            errors[column - block.start] = error
            rest = slice(column + 1, block.stop)
            values[rest].addr_(factor[column, rest], error, alpha=-1)
        values[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
    spread = torch.empty_like(rounded)
    spread[order] = rounded
    return spread.T.contiguous(), damping


def weight_on(grid: FloatGrid, values: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Weights (rows, C) as their nearest numbers on the grid."""
    codes = grid.codes(grouped_view(values, scheme)).view(values.shape)
    scale = grid.scale.squeeze(-1)
    return QuantizedWeight(codes, scale, torch.zeros_like(scale, dtype=torch.uint8), scheme, grid.divisor)


def full_range(weight: Tensor, scheme: Scheme, dtype: torch.dtype, largest: Tensor | None) -> FloatGrid:
    """The grid of the weights' whole ranges."""
    return float_grid(grouped_view(weight, scheme), scheme, dtype, largest)
