"""One decoder layer, one recipe: scales, fold, clip, round.

All scales of a layer are found and folded before any linear is rounded: a later fold divides rows of `up`
and `v`, which must not happen after they became integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from app.core.architectures import Architecture, ScaleGroup
from app.core.errors import RecipeUnsupported
from app.core.format_limits import Scheme
from app.core.report import LinearReport
from app.core.specs import Recipe
from workers.modeling.quantized_weight import QuantizedWeight
from workers.quantization.clip_search import search_clip
from workers.quantization.grid import Grid, grouped_view, min_max_grid
from workers.quantization.input_statistics import InputStatistics
from workers.quantization.scale_search import FLOAT16_LIMIT, Fold, ScaleChoice, ScaledLinear, search_scales


@dataclass(frozen=True)
class LayerTask:
    """What is to be done to one layer. `weights` are float32 by name in the layer."""

    architecture: Architecture
    recipe: Recipe
    schemes: dict[str, Scheme]  # of the linears that are quantized
    head_dim: int
    weights: dict[str, Tensor]
    statistics: list[InputStatistics]  # one per group of the architecture
    dtype: torch.dtype  # of the checkpoint's weights


@dataclass(frozen=True)
class LayerResult:
    """A quantized layer: integers for the linears, and the other tensors that the fold changed."""

    quantized: dict[str, QuantizedWeight]  # by linear
    dense: dict[str, Tensor]  # by tensor name, float32, representable in the checkpoint's dtype
    report: list[LinearReport]  # one entry per quantized linear

    def weights(self, original: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of the layer with the quantized ones dequantized."""
        linears = {name + ".weight": weight.dequantize() for name, weight in self.quantized.items()}
        return {**original, **self.dense, **linears}


def quantize_layer(task: LayerTask) -> tuple[LayerResult, dict[str, Tensor]]:
    """The quantized layer, and the folded but unrounded weights for the equivalence check."""
    choices = [choose_scales(task, index) for index in range(len(task.architecture.groups))]
    folded = fold(task, choices)
    quantized: dict[str, QuantizedWeight] = {}
    report: list[LinearReport] = []
    for group, statistics, choice in zip(task.architecture.groups, task.statistics, choices, strict=True):
        moment = statistics.second_moment
        if choice is not None:
            moment = moment / torch.outer(choice.scales, choice.scales)
        for name in group.balance_layers:
            if name in task.schemes:
                quantized[name], losses = quantize_linear(task, name, folded[name + ".weight"], moment)
                plain = rounding_baseline(task, name, folded[name + ".weight"], choice, moment)
                report.append(linear_report(name, task.schemes[name], choice, (plain, *losses)))
    linears = {name + ".weight" for name in task.schemes}
    dense = {
        name: value.to(task.dtype).to(torch.float32)
        for name, value in folded.items()
        if name not in linears and value is not task.weights[name]
    }
    return LayerResult(quantized, dense, report), folded


def choose_scales(task: LayerTask, index: int) -> ScaleChoice | None:
    """Scales of one group, or None where the recipe or a kept linear of the group forbids them."""
    group = task.architecture.groups[index]
    scaled = group.balance_layers + ((group.smooth_layer,) if group.smooth_kind == "linear" else ())
    if task.recipe.method != "awq" or any(name not in task.schemes for name in scaled):
        return None
    linears = [
        ScaledLinear(task.weights[name + ".weight"], task.schemes[name]) for name in group.balance_layers
    ]
    return search_scales(linears, task.statistics[index], fold_of(task, group), task.recipe.search)


def fold_of(task: LayerTask, group: ScaleGroup) -> Fold:
    smooth = task.weights[group.smooth_layer + ".weight"]
    channels = task.weights[group.balance_layers[0] + ".weight"].shape[1]
    heads = None
    if group.repeats_heads and smooth.shape[0] != channels:
        heads = (smooth.shape[0] // task.head_dim, channels // smooth.shape[0], task.head_dim)
    return Fold(smooth, group.smooth_kind == "norm", heads, task.dtype)


def fold(task: LayerTask, choices: list[ScaleChoice | None]) -> dict[str, Tensor]:
    """The layer's weights with every choice folded in; the function of the layer is unchanged."""
    weights = dict(task.weights)
    for group, choice in zip(task.architecture.groups, choices, strict=True):
        if choice is None:
            continue
        fold_spec = fold_of(task, group)
        shared = choice.scales if fold_spec.head_shape is None else fold_spec.shared(choice.scales)
        for name in group.balance_layers:
            weights[name + ".weight"] = weights[name + ".weight"] * choice.scales
        for name in (group.smooth_layer + ".weight", group.smooth_layer + ".bias"):
            if name in weights:
                value = weights[name]
                weights[name] = value / (shared[:, None] if value.dim() == 2 else shared)
    return weights


def quantize_linear(
    task: LayerTask, name: str, weight: Tensor, moment: Tensor
) -> tuple[QuantizedWeight, tuple[float, float]]:
    """Clip and round one folded linear; the loss before and after the clip search.

    Raises RecipeUnsupported if the folded weights leave what float16 can hold.
    """
    if float(weight.abs().amax()) > FLOAT16_LIMIT:
        raise RecipeUnsupported(
            f"{name}: weights up to {float(weight.abs().amax()):.3g} do not fit float16",
            code="weights_overflow", remedy="use method rtn, or ignore this linear",
        )  # fmt: skip
    scheme = task.schemes[name]
    if task.recipe.method == "awq" and task.recipe.search.clip:
        grid, before, after = search_clip(weight, moment, scheme, task.dtype)
    else:
        grid = min_max_grid(grouped_view(weight, scheme), scheme, task.dtype)
        before = after = row_losses(weight, grid, scheme, moment)
    quantized = round_nearest(weight, grid, scheme)
    loss_before, loss_after = float(before.sum()), float(after.sum())
    if not math.isfinite(loss_after):
        raise RecipeUnsupported(
            f"{name}: the rounding error is not finite", code="search_not_finite",
            remedy="check the calibration text and the model's weights",
        )  # fmt: skip
    return quantized, (loss_before, loss_after)


def rounding_baseline(
    task: LayerTask, name: str, folded: Tensor, choice: ScaleChoice | None, moment: Tensor
) -> float:
    """The loss of plain rounding, in the unit of the others: rows as the next group's fold left them."""
    weight, scheme = folded, task.schemes[name]
    if choice is not None:
        weight, moment = folded / choice.scales, moment * torch.outer(choice.scales, choice.scales)
    grid = min_max_grid(grouped_view(weight, scheme), scheme, task.dtype)
    return float(row_losses(weight, grid, scheme, moment).sum())


def row_losses(weight: Tensor, grid: Grid, scheme: Scheme, moment: Tensor) -> Tensor:
    """(rows,): e H e^T of each row's rounding error e."""
    error = grid.nearest(grouped_view(weight, scheme)).view_as(weight) - weight
    return ((error @ moment) * error).sum(dim=1)


def round_nearest(weight: Tensor, grid: Grid, scheme: Scheme) -> QuantizedWeight:
    """Every weight to its nearest integer; out of range ones are clamped, never wrapped."""
    integers = grid.integers(grouped_view(weight, scheme)).view_as(weight)
    return QuantizedWeight(
        integers.to(torch.uint8), grid.scale.squeeze(-1), grid.zero.squeeze(-1).to(torch.uint8), scheme
    )


def linear_report(
    name: str, scheme: Scheme, choice: ScaleChoice | None, losses: tuple[float, float, float]
) -> LinearReport:
    """losses: of plain rounding, with scales, with scales and clip."""
    plain, unclipped, clipped = losses
    return LinearReport(
        linear=name,
        bits=scheme.bits,
        group_size=scheme.group_size,
        ratio=None if choice is None else choice.ratio,
        duo_scaling=None if choice is None else choice.duo,
        scale_spread=None if choice is None else float(choice.scales.max() / choice.scales.min()),
        loss_rounding=plain,
        loss_unclipped=unclipped,
        loss=clipped,
        clip_gain=1 - clipped / unclipped if unclipped > 0 else 0.0,
    )
