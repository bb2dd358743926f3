"""One decoder layer, one recipe: scales, fold, clip, round.

All scales of a layer are found and folded before any linear is rounded: a later fold divides rows of `up`
and `v`, which must not happen after they became integers. Then the groups are rounded in the order of data,
so that a recipe on the quantized chain can observe each after the ones before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from app.core.formats.registry import FORMATS, FormatName
from app.core.jobs.report import LearningReport, LinearReport
from app.core.planning.architectures import Architecture, ScaleGroup
from app.core.planning.cached_attention import ATTENTION, CACHE_SCALES, VALUES
from app.core.records.specs import Recipe
from kernels.search import losses
from kernels.search.search_operators import clip_backend
from workers.modeling.cache_rounding import cache_scale
from workers.modeling.float_numbers import largest_float
from workers.modeling.input_rounding import static_scale
from workers.modeling.layer_weights import (
    Deferred,
    DeferredWeights,
    LookedUp,
    Weights,
    deferred,
    held,
    replaced,
)
from workers.modeling.quantized_weight import QuantizedWeight
from workers.quantization.cache_range import CacheRange
from workers.quantization.evolution import evolve_scales
from workers.quantization.float_grids import float_grid
from workers.quantization.folding import Heads, divided_outputs, fold_of, fold_scales
from workers.quantization.grid import grouped_view, min_max_grid
from workers.quantization.input_statistics import InputStatistics
from workers.quantization.omniquant import Draft, Lesson, Teacher
from workers.quantization.rounding import (
    FoldedLinear,
    RoundedLinear,
    refuse_overflow,
    round_linear,
    row_losses,
)
from workers.quantization.scale_search import ScaleChoice, ScaledLinear, search_scales

# Groups, the layer's weights so far (scaled, some rounded), the scales by group -> what the groups see.
Observe = Callable[[Sequence[int], Weights, Sequence[Tensor | None]], Sequence[InputStatistics]]


@dataclass(frozen=True)
class OwnChain:
    """The view of one layer on the quantized chain of one recipe."""

    observe: Observe
    lesson: Callable[[], Lesson] | None  # None for the head, whose outputs are too many to learn from


@dataclass(frozen=True)
class LayerTask:
    """The work on one layer; finished linears go to `quantized`."""

    architecture: Architecture  # with the groups of this layer
    recipe: Recipe
    schemes: dict[str, Scheme]  # of the linears that are quantized
    heads: Heads
    weights: Weights  # float32, by name in the layer
    statistics: Sequence[InputStatistics]  # one per group, or none where the chain has all that is read
    dtype: torch.dtype  # of the checkpoint's weights
    chain: OwnChain | None = None  # of a recipe on the quantized chain
    formats: tuple[FormatName, ...] = ("compressed-tensors",)  # of the files
    quantized: MutableMapping[str, QuantizedWeight] = field(default_factory=dict)
    cache: CacheRange | None = None  # of a layer that keeps keys and values, where their range was collected

    @property
    def in_float16(self) -> bool:
        """Whether the files may be run in float16."""
        return self.dtype == torch.float16 or any(FORMATS[name].scale_dtype == "F16" for name in self.formats)

    def largest(self, name: str, index: int, weights: Weights) -> Tensor | None:
        """The largest size of the weights whose scales one number divides: servers make one matrix of the
        linears of a module with one input, groups[index]."""
        if self.schemes[name].kind.scales != "e4m3":
            return None
        module, linears = name.rpartition(".")[0], self.architecture.groups[index].balance_layers
        fused = [each for each in linears if each in self.schemes and each.rpartition(".")[0] == module]
        return torch.stack([weights[each + ".weight"].abs().amax() for each in fused]).amax()

    def refuse_overflow(self, linear: FoldedLinear) -> None:
        """Raises RecipeUnsupported for weights that the files can't hold."""
        original, fused = self.weights[linear.name + ".weight"], self.architecture.fused_set(linear.name)
        refuse_overflow(linear, original, fused, in_float16=self.in_float16)


@dataclass(frozen=True)
class LayerResult:
    """A quantized layer: integers for the linears, and the other tensors that the fold changed or that are
    new, which are the scales of a cache."""

    quantized: Mapping[str, QuantizedWeight]  # by linear; those of experts may be read at look-up
    dense: dict[str, Tensor]  # by tensor name, float32, representable in the checkpoint's dtype
    report: list[LinearReport]  # one entry per quantized linear
    learning: LearningReport | None = None

    def to(self, device: torch.device) -> LayerResult:
        linears = LookedUp(self.quantized.keys(), lambda name: self.quantized[name].to(device))
        return LayerResult(
            dict(linears) if isinstance(self.quantized, dict) else linears,
            {name: value.to(device) for name, value in self.dense.items()},
            self.report,
        )

    def weights(self, original: Weights) -> Weights:
        """All tensors of the layer with the quantized ones dequantized."""
        changed = {name: value for name, value in self.dense.items() if name in original}
        return dequantized(replaced(original, changed), self.quantized, self.quantized)


def dequantized(weights: Weights, quantized: Mapping[str, QuantizedWeight], names: Iterable[str]) -> Weights:
    """The weights with these linears dequantized: at once, or at look-up as before."""
    later, tensors = deferred(weights), {f"{name}.weight": name for name in names}

    def tensor(key: str) -> Tensor:
        return quantized[tensors[key]].dequantize()

    now = {key: tensor(key) for key in tensors if key not in later}
    reads = {key: Deferred(later[key].shape, partial(tensor, key)) for key in tensors if key in later}
    return replaced(weights, DeferredWeights(now, reads))


def quantize_layer(task: LayerTask) -> tuple[LayerResult, Weights]:
    """The quantized layer, and the folded but unrounded weights for the equivalence check."""
    choices = [choose_scales(task, index) for index in range(len(task.architecture.groups))]
    folded = fold_scales(task.weights, task.heads, task.architecture.groups, choices)
    learns = task.recipe.method == "omniquant" and task.chain is not None and task.chain.lesson is not None
    linears: dict[str, FoldedLinear] = {}
    quantized = task.quantized
    report: list[LinearReport] = []
    weights = folded  # the linears that are rounded replace theirs
    for stage in task.architecture.stages:
        names = list[str]()
        for index, seen in zip(stage, observed(task, stage, weights, choices), strict=True):
            for name in task.architecture.groups[index].balance_layers:
                if name in task.schemes:
                    plain = folded[name + ".weight"]
                    linear = FoldedLinear(
                        name, seen.corrected(plain), seen.moment, task.schemes[name], plain,
                        task.largest(name, index, folded),
                    )  # fmt: skip
                    if learns:
                        linears[name] = linear
                    task.refuse_overflow(linear)
                    rounded = round_linear(linear, task.recipe, task.dtype)
                    quantized[name] = with_input_scale(rounded.weight, seen, task.dtype)
                    names.append(name)
                    report.append(entry_of(task, index, choices[index], linear, rounded))
        if task.chain is not None:
            weights = dequantized(weights, quantized, names)
    result = LayerResult(quantized, stored_dense(task, folded) | cache_scales(task, choices), report)
    if learns:
        return learned_layer(task, linears, folded, choices, result)
    return result, folded


def stored_dense(task: LayerTask, folded: Weights) -> dict[str, Tensor]:
    """The tensors beside the quantized ones that the fold has changed, as they will be stored.

    No deferred one is among them: experts that keep their precision get no scales.
    """
    linears = {name + ".weight" for name in task.schemes}
    return {
        name: value.to(task.dtype).to(torch.float32)
        for name, value in held(folded).items()
        if name not in linears and value is not task.weights[name]
    }


def cache_scales(task: LayerTask, *folds: Sequence[ScaleChoice | None]) -> dict[str, Tensor]:
    """Of keys and values, by tensor name, after these scales are folded in: those of what reads the values
    divide them."""
    if task.recipe.kv_cache is None or task.cache is None:
        return {}
    value = task.cache.value
    groups = task.architecture.groups
    for group, choice in (pair for fold in folds for pair in zip(groups, fold, strict=True)):
        if choice is not None and group.smooth_layer in VALUES:
            value = divided_outputs(task.weights, task.heads, group, choice.scales, value)
    return {
        f"{ATTENTION}.{name}": cache_scale(task.recipe.kv_cache, sizes.amax(), task.dtype)
        for name, sizes in zip(CACHE_SCALES, (task.cache.key, value), strict=True)
    }


def learned_layer(
    task: LayerTask,
    linears: dict[str, FoldedLinear],
    folded: Weights,
    choices: Sequence[ScaleChoice | None],
    start: LayerResult,
) -> tuple[LayerResult, Weights]:
    """The layer after OmniQuant's lesson, and its folded but unrounded weights."""
    assert task.chain is not None
    assert task.chain.lesson is not None
    groups = task.architecture.groups
    aims = {**folded, **{name + ".weight": linear.weight for name, linear in linears.items()}}
    scaled = tuple(choice is not None for choice in choices)
    draft = Draft(task.architecture, task.heads, task.dtype, aims, scaled, dict(start.quantized))
    teacher = Teacher(draft, task.chain.lesson())
    learned = teacher.teach(task.recipe.search.epochs, fixed_integers=task.recipe.rounds_with_gptq)
    folded = fold_scales(folded, task.heads, groups, learned.scales)
    aims = dict(fold_scales(aims, task.heads, groups, learned.scales))
    losses = {}
    for group, choice in zip(groups, learned.scales, strict=True):
        for name in (name for name in group.balance_layers if name in linears):
            moment = linears[name].moment
            if choice is not None:
                moment = moment / torch.outer(choice.scales, choice.scales)
            rows = row_losses(aims[name + ".weight"], learned.quantized[name], moment)
            losses[name] = float(rows.sum())
    report = [entry.model_copy(update={"loss": losses[entry.linear]}) for entry in start.report]
    dense = stored_dense(task, folded) | cache_scales(task, choices, learned.scales)
    result = LayerResult(learned.quantized, dense, report, learned.report)
    return result, folded


def with_input_scale(weight: QuantizedWeight, seen: InputStatistics, dtype: torch.dtype) -> QuantizedWeight:
    """The weight with the scale of its input, where the scheme takes that from calibration."""
    inputs = weight.scheme.kind.inputs
    if inputs is None or not inputs.needs_range:
        return weight
    assert seen.abs_max is not None
    return replace(weight, input_scale=static_scale(inputs, seen.abs_max.amax(), dtype))


def observed(
    task: LayerTask, stage: Sequence[int], weights: Weights, choices: list[ScaleChoice | None]
) -> Iterable[InputStatistics]:
    """Input statistics of a stage's groups, from their recipe's own chain or from the original model."""
    scales = [None if choice is None else choice.scales for choice in (choices[index] for index in stage)]
    if task.chain is not None:
        return task.chain.observe(stage, weights, scales)
    return (task.statistics[index].scaled(factor) for index, factor in zip(stage, scales, strict=True))


def choose_scales(task: LayerTask, index: int) -> ScaleChoice | None:
    """Scales of one group, or None where the recipe, the group or a kept linear of it forbids them."""
    group = task.architecture.groups[index]
    if not task.recipe.searches_scales or unscaled_for(task, group) is not None:
        return None
    if f"{group.smooth_layer}.weight" not in task.weights:
        return None
    linears = [
        ScaledLinear(task.weights, name + ".weight", task.schemes[name]) for name in group.balance_layers
    ]
    search, statistics = task.recipe.search, task.statistics[index]
    target = fold_of(task.weights, task.heads, group, task.dtype)
    choice = search_scales(linears, statistics, target, search)
    if search.strategy == "evolutionary":
        return evolve_scales(linears, statistics, target, search, choice)
    return choice


def unscaled_for(task: LayerTask, group: ScaleGroup) -> str | None:
    """Why a recipe that searches scales gives none to the group."""
    if group.unscaled is not None:
        return group.unscaled
    scaled = group.balance_layers + ((group.smooth_layer,) if group.smooth_kind == "linear" else ())
    unquantized = [name for name in scaled if name not in task.schemes]
    return f"no scales: {unquantized[0]} keeps its precision" if unquantized else None


def entry_of(
    task: LayerTask, index: int, choice: ScaleChoice | None, linear: FoldedLinear, rounded: RoundedLinear
) -> LinearReport:
    """The report of one linear of group `index`."""
    entry = linear_report(linear.name, choice, rounding_baseline(linear, choice, task.dtype), rounded)
    group = task.architecture.groups[index]
    reason = few_tokens(task.statistics[index]) if task.statistics else None
    if task.recipe.searches_scales:
        reason = unscaled_for(task, group) or reason
    backend = None
    if task.recipe.searches_clip and linear.scheme.kind.numbers == "int":
        width = linear.weight.shape[1] // linear.scheme.groups(linear.weight.shape[1])
        backend = clip_backend(linear.weight.device, width)
    return entry.model_copy(update={"reason": reason, "energy": output_energy(linear), "backend": backend})


def few_tokens(statistics: InputStatistics) -> str | None:
    """A note on an expert that few calibration tokens reach; None if enough do."""
    if statistics.confidence == 1:
        return None
    others = statistics.num_tokens - (statistics.routed_tokens or 0)
    return (
        f"only {statistics.routed_tokens} calibration tokens are routed to this expert; {others} of other "
        "experts were added, and scales drawn towards one"
    )


def rounding_baseline(linear: FoldedLinear, choice: ScaleChoice | None, dtype: torch.dtype) -> float:
    """The loss of plain rounding, in the unit of the others: rows as the next group's fold left them."""
    weight, plain, moment, scheme = linear.weight, linear.plain, linear.moment, linear.scheme
    if choice is not None:
        weight, plain = weight / choice.scales, plain / choice.scales
        moment = moment * torch.outer(choice.scales, choice.scales)
    grouped = grouped_view(plain, scheme)
    is_float = scheme.kind.numbers == "float"
    grid = float_grid(grouped, scheme, dtype) if is_float else min_max_grid(grouped, scheme, dtype)
    error = grid.nearest(grouped).view_as(weight).sub_(weight)
    return float(losses.quick_row_losses(error, moment).sum())


def output_energy(linear: FoldedLinear) -> float:
    """Mean square of the output, which its losses are divided by in reports."""
    return float(losses.quick_row_losses(linear.weight, linear.moment).sum())


def integer_range(choice: ScaleChoice | None, rounded: RoundedLinear) -> tuple[float, float]:
    """Medians over groups of the smallest and largest weight that the numbers hold, in the model's units."""
    scheme, scale, zero = rounded.weight.scheme, rounded.weight.scale, rounded.weight.zero.float()
    top: Tensor | float = 2**scheme.bits - 1
    if scheme.kind.numbers == "float":
        top = largest_float(scheme.bits)
        zero = torch.full_like(scale, top / 2)
        scale = 2 * scale  # the numbers lie evenly on both sides of zero
    if choice is not None:
        # The folded weight is column times scale: a group as a whole is about the mean of its columns'.
        scale = scale / choice.scales.to(scale.device).view(scale.shape[1], -1).mean(dim=1)
    return float((-zero * scale).median()), float(((top - zero) * scale).median())


def linear_report(
    name: str, choice: ScaleChoice | None, loss_rounding: float, rounded: RoundedLinear
) -> LinearReport:
    unclipped, scheme = rounded.loss_unclipped, rounded.weight.scheme
    low, high = integer_range(choice, rounded)
    return LinearReport(
        linear=name,
        bits=scheme.bits,
        group_size=scheme.group_size,
        scheme=None if scheme.is_plain else scheme.name,
        ratio=None if choice is None else choice.ratio,
        weight_ratio=None if choice is None else choice.weight_ratio,
        scale_spread=None if choice is None else float(choice.scales.max() / choice.scales.min()),
        loss_rounding=loss_rounding,
        loss_unclipped=unclipped,
        loss_clipped=rounded.loss_clipped,
        loss=rounded.loss,
        clip_gain=1 - rounded.loss_clipped / unclipped if unclipped > 0 else 0.0,
        clip_low=low,
        clip_high=high,
        clip_floor=rounded.clip_floor,
        damping=rounded.damping,
    )
