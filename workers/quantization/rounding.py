"""One folded linear to integers: the range of each group, then nearest or GPTQ rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from app.core.errors import RecipeUnsupported
from app.core.formats.file_format import Scheme
from app.core.planning.plan import set_names
from app.core.records.specs import Recipe
from kernels.search import losses
from kernels.search.grids import LARGEST_SCALE
from workers.modeling.quantized_weight import QuantizedWeight
from workers.quantization import float_rounding
from workers.quantization.clip_search import search_clip, smallest_factor
from workers.quantization.gptq import round_gptq
from workers.quantization.grid import FLOAT16_LIMIT, Grid, grouped_view, min_max_grid

# How far ranges are shrunk for GPTQ, as shares of what the clip search may cut off at most.
SHRUNK = {2: (0.7, 1.0, 1.3), 3: (0.3, 0.5, 0.7), 4: (0.15, 0.3, 0.45), 8: (0.0,)}


@dataclass(frozen=True)
class FoldedLinear:
    """A linear with all scales of its layer folded in, and the second moment of its folded input."""

    name: str
    weight: Tensor  # (rows, C) float32: what the rounded weights should come near to
    moment: Tensor  # (C, C) float32
    scheme: Scheme
    plain: Tensor  # (rows, C) float32: without the correction for errors of earlier layers
    largest: Tensor | None = None  # the largest size of the weights that share a divisor with these


@dataclass(frozen=True)
class RoundedLinear:
    """A quantized linear and its losses `tr(E H E^T)` step by step."""

    weight: QuantizedWeight
    loss_unclipped: float  # nearest integers on the full ranges
    loss_clipped: float  # nearest integers on the searched ranges
    loss: float  # as rounded
    damping: float | None = None  # of GPTQ
    clip_floor: float | None = None  # the smallest share of a range that the clip search tried


def round_linear(linear: FoldedLinear, recipe: Recipe, dtype: torch.dtype) -> RoundedLinear:
    """The integers of a linear; `dtype` is the checkpoint's, whose grid the scales must fit.

    Raises RecipeUnsupported if no finite error can be found.
    """
    weight, moment, scheme = linear.weight, linear.moment, linear.scheme
    if scheme.kind.numbers == "float":
        return checked(linear, *round_float(linear, recipe, dtype))
    floor = smallest_factor(weight, scheme) if recipe.searches_clip else None
    if floor is not None:
        grid, before, after = search_clip(weight, moment, scheme, dtype, floor)
    else:
        grid = min_max_grid(grouped_view(weight, scheme), scheme, dtype)
        nearest = round_nearest(weight, grid, scheme)
        before = after = losses.quick_row_losses(nearest.dequantize() - weight, moment)
    rounded, final, damping = round_nearest(weight, grid, scheme), after, None
    if recipe.rounds_with_gptq:
        grids = [grid] if floor is None else [grid, *shrunk_grids(weight, scheme, dtype, floor)]
        outcome = round_gptq(weight, grids, scheme, moment, dtype)
        rounded = rounded.where(after <= outcome.losses, outcome.weight)
        final, damping = torch.minimum(after, outcome.losses), outcome.damping
    return checked(linear, rounded, (before, after, final), damping, floor)


def round_float(
    linear: FoldedLinear, recipe: Recipe, dtype: torch.dtype
) -> tuple[QuantizedWeight, tuple[Tensor, Tensor, Tensor], float | None]:
    """The numbers of a linear of a float scheme, the losses per row step by step, and GPTQ's damping."""
    weight, moment, scheme, damping = linear.weight, linear.moment, linear.scheme, None
    grid = float_rounding.full_range(weight, scheme, dtype, linear.largest)
    if recipe.searches_clip:
        grid, before, after = float_rounding.search_scales_of_groups(weight, moment, scheme, grid, dtype)
    else:
        nearest = float_rounding.weight_on(grid, weight, scheme)
        before = after = losses.quick_row_losses(nearest.dequantize() - weight, moment)
    rounded, final = float_rounding.weight_on(grid, weight, scheme), after
    if recipe.rounds_with_gptq:
        spread, damping = float_rounding.spread_errors(weight, grid, moment)
        other = float_rounding.weight_on(grid, spread, scheme)
        lost = losses.row_losses(other.dequantize() - weight, moment)
        rounded, final = rounded.where(after <= lost, other), torch.minimum(after, lost)
    return rounded, (before, after, final), damping


def checked(
    linear: FoldedLinear,
    rounded: QuantizedWeight,
    by_step: tuple[Tensor, Tensor, Tensor],
    damping: float | None,
    floor: float | None = None,
) -> RoundedLinear:
    """The outcome with the sums of its losses. Raises RecipeUnsupported if one is not finite."""
    unclipped, clipped, loss = (float(rows.sum()) for rows in by_step)
    if not math.isfinite(unclipped + clipped + loss):
        raise RecipeUnsupported(
            f"{linear.name}: the rounding error is not finite", code="search_not_finite",
            remedy="check the calibration text and the model's weights",
        )  # fmt: skip
    return RoundedLinear(rounded, unclipped, clipped, loss, damping, floor)


def refuse_overflow(
    linear: FoldedLinear, original: Tensor, fused: tuple[str, ...], *, in_float16: bool
) -> None:
    """Raises RecipeUnsupported for weights that the files or their readers can't hold.

    `original`: the weights before scales were folded in. `fused`: the linears that share its scheme.
    `in_float16`: the files may be run in float16. Else their scales are the limit: those of all files are
    values of float16, so that one set of integers serves every format.
    """
    limit = largest_weight(linear.scheme, in_float16=in_float16)
    largest = float(linear.weight.abs().amax())
    if not largest > limit:  # also of what is not a number: the losses tell
        return
    ignoring = f"let `ignore` match {set_names(fused)} of this layer"
    if float(original.abs().amax()) <= limit:
        why, remedy = "with their scales folded in", f"use method rtn or gptq, which fold none, or {ignoring}"
    elif in_float16:
        why = "in files that are run in float16"
        remedy = f"use a bfloat16 model and the format compressed-tensors alone, or {ignoring}"
    else:
        why, remedy = f"at {linear.scheme.bits} bits", f"use more bits, or {ignoring}"
    raise RecipeUnsupported(
        f"{linear.name}: weights up to {largest:.3g} are beyond the limit of {limit:.3g} {why}",
        code="weights_overflow", remedy=remedy,
    )  # fmt: skip


def largest_weight(scheme: Scheme, *, in_float16: bool) -> float:
    """The limit of the weights that files hold."""
    widest = (2**scheme.bits - 1) / 2 if scheme.kind.numbers == "int" else 1.0
    return FLOAT16_LIMIT if in_float16 else LARGEST_SCALE * widest


def shrunk_grids(weight: Tensor, scheme: Scheme, dtype: torch.dtype, floor: float) -> list[Grid]:
    """Grids of equally shrunk ranges in all groups, for GPTQ to start from; floor: the `smallest_factor`."""
    grouped = grouped_view(weight, scheme)
    factors = [1 - share * (1 - floor) for share in SHRUNK[scheme.bits]]
    return [min_max_grid(grouped, scheme, dtype, factor=factor) for factor in factors]


def row_losses(weight: Tensor, rounded: QuantizedWeight, moment: Tensor) -> Tensor:
    """(rows,): e H e^T of each row's rounding error e."""
    return losses.row_losses(rounded.dequantize() - weight, moment)


def round_nearest(weight: Tensor, grid: Grid, scheme: Scheme) -> QuantizedWeight:
    """Every weight to its nearest integer; out of range ones are clamped, never wrapped."""
    integers = grid.integers(grouped_view(weight, scheme)).view_as(weight)
    return QuantizedWeight(integers, grid.scale.squeeze(-1), grid.zero.squeeze(-1).to(torch.uint8), scheme)
