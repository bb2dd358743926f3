"""AWQ's scale search on statistics: no forward pass, so a candidate's cost is free of the token count.

For linears W_k that read x, scales s replace W by Q(W diag(s)) diag(1/s). Where the group's outputs are
linear in W the expected squared error is `sum_k tr(E_k H E_k^T)`, E_k the weight error and H = E[x x^T].
Candidates (AWQ, arXiv 2306.00978, section 3.2; duo scaling as AutoAWQ): s = xm^r and s = xm^r / wm^(1-r),
where xm is the mean of |x| and wm the mean normalised |w| of a channel. Ratio 0 without duo scaling is
the identity; it is always tried, so the search never does worse than plain rounding by this loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from app.core.records.specs import SearchSpec
from kernels.search.losses import has_bfloat16_products, quick_dtype, row_losses
from kernels.search.search_operators import rounding_errors
from workers.modeling.layer_weights import Weights, shape_of
from workers.quantization.float_grids import float_rounding_errors
from workers.quantization.grid import FLOAT16_LIMIT, grouped_view
from workers.quantization.input_noise import input_noise
from workers.quantization.input_statistics import InputStatistics

MAX_SPREAD = 1e4  # largest s_max / s_min: a few extreme channels must not stretch all others
SAMPLED_ROWS = 512  # of a group's linears together, to rank candidates on
FINALISTS = 4  # candidates that are compared on all rows, the identity among them
ERRORS_AT_ONCE = {"cpu": 2**23, "cuda": 2**28}  # values; bounds memory


@dataclass(frozen=True)
class ScaledLinear:
    """One balance layer of the search."""

    weights: Weights  # that it is looked up in
    name: str
    scheme: Scheme

    @classmethod
    def of(cls, weight: Tensor, scheme: Scheme) -> ScaledLinear:
        return cls({"weight": weight}, "weight", scheme)

    @property
    def weight(self) -> Tensor:
        """(out_features, C) float32."""
        return self.weights[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.weights, self.name)

    def rounding_errors(
        self, scales: Tensor, dtype: torch.dtype, range_factor: float, error_dtype: torch.dtype
    ) -> Tensor:
        """(candidates, out_features, C): the operator of that name with this linear's grid."""
        scheme = self.scheme
        if scheme.kind.numbers == "float":
            return float_rounding_errors(self.weight, scales, scheme, dtype).to(error_dtype)
        errors: Tensor = rounding_errors(
            self.weight, scales, scheme.bits, scheme.group_size, scheme.symmetric, dtype, range_factor,
            error_dtype,
        )  # fmt: skip
        return errors


@dataclass(frozen=True)
class ScaleChoice:
    """The best scales of a group, with their loss."""

    scales: Tensor  # (C,) float32
    ratio: float  # exponent of the activations' means
    weight_ratio: float  # exponent of the weights' means; 1 - ratio with duo scaling, else 0
    loss_identity: float  # plain rounding
    loss: float


@dataclass(frozen=True)
class Fold:
    """The module that absorbs the scales; it decides which values they can take."""

    smooth_weight: Tensor  # (C',) of a norm, or (C', n) of a linear; float32, what it multiplies by
    is_norm: bool
    head_shape: tuple[int, int, int] | None  # (kv heads, repeats, head_dim) where heads share scales
    dtype: torch.dtype  # of the stored smooth weight
    offset: float = 0.0  # the norm adds it to what is stored

    def shared(self, values: Tensor) -> Tensor:
        """(C,) channel values averaged over the channels that must share a scale: (C',)."""
        return values if self.head_shape is None else values.view(self.head_shape).mean(dim=1).flatten()

    def spread(self, values: Tensor) -> Tensor:
        """(..., C') values repeated to the channels of the balance layers: (..., C)."""
        if self.head_shape is None:
            return values
        kv_heads, repeats, head_dim = self.head_shape
        heads = values.view(-1, kv_heads, 1, head_dim).expand(-1, -1, repeats, -1)
        return heads.reshape(*values.shape[:-1], -1)

    def representable(self, scales: Tensor) -> Tensor:
        """The nearest scales whose fold is exact: a norm's weight is stored in few bits, so take
        s = w / round(w / s), and the product of norm and balance layer is what it was. With an offset o
        the file holds w - o: s = w / (o + round(w / s - o))."""
        if not self.is_norm:
            return scales
        stored = (self.smooth_weight / scales - self.offset).to(self.dtype).to(torch.float32) + self.offset
        usable = torch.isfinite(stored) & (stored != 0) & (self.smooth_weight != 0)
        return torch.where(usable, self.smooth_weight / stored, torch.ones_like(scales))

    def fits(self, scales: Tensor) -> Tensor:
        """(...,): false where dividing by `scales` (..., C') leaves float16's range, which servers use."""
        size = self.smooth_weight.abs()
        largest = size if size.dim() == 1 else size.amax(dim=1)
        return (largest / scales).amax(dim=-1) < FLOAT16_LIMIT


def weight_means(linears: list[ScaledLinear]) -> Tensor:
    """(C,): mean over all rows of |w| divided by its group's largest."""
    total: Tensor | int = 0
    for linear in linears:
        size = grouped_view(linear.weight.abs(), linear.scheme)
        total = total + (size / size.amax(dim=-1, keepdim=True).clamp(min=1e-30)).sum(dim=0).flatten()
    assert isinstance(total, Tensor)
    return total / sum(linear.shape[0] for linear in linears)


def normalised(log_scales: Tensor, alive: Tensor) -> Tensor:
    """exp of the logarithms (..., C), centred between their extremes; 1 for dead channels.

    In logarithms neither the product of the extremes nor a power can leave the range of floats.
    """
    highest = torch.where(alive, log_scales, -torch.inf).amax(dim=-1, keepdim=True)
    lowest = torch.where(alive, log_scales, torch.inf).amin(dim=-1, keepdim=True)
    limit = math.log(MAX_SPREAD) / 2
    centred = (log_scales - (highest + lowest) / 2).clamp(-limit, limit)
    return torch.where(alive, centred, torch.zeros_like(centred)).exp()


@dataclass(frozen=True)
class Candidates:
    """The scales to try, the identity first."""

    ratios: list[tuple[float, float]]  # exponents of the activations' and of the weights' means
    scales: Tensor  # (candidates, C) of the balance layers

    def __len__(self) -> int:
        return len(self.ratios)


def exponents(search: SearchSpec) -> list[tuple[float, float]]:
    """Exponents of both means on the grid, without the identity."""
    pairs: list[tuple[float, float]] = []
    ratios = [step / search.grid_points for step in range(search.grid_points + 1)]
    if search.duo_scaling is not True:
        pairs += [(ratio, 0.0) for ratio in ratios[1:]]
    if search.duo_scaling is not False:
        # Ratio 1 is the same with and without the weights.
        pairs += [(r, 1 - r) for r in (ratios if search.duo_scaling is True else ratios[:-1])]
    return pairs


def grid_scales(grid: list[tuple[float, float]], x_mean: Tensor, w_mean: Tensor) -> Tensor:
    """x_mean^a / w_mean^b for each (a, b) of the grid, normalised: (candidates, C)."""
    alive = (x_mean > 0) & (w_mean > 0)
    log_x, log_w = torch.where(alive, x_mean, 1.0).log(), torch.where(alive, w_mean, 1.0).log()
    a, b = torch.tensor(grid, device=x_mean.device)[..., None].unbind(dim=1)
    return normalised(a * log_x - b * log_w, alive)


def candidates(
    linears: list[ScaledLinear], statistics: InputStatistics, fold: Fold, search: SearchSpec
) -> Candidates:
    """The grid's scales as the fold can hold them, and the identity, which is exact as it is."""
    x_mean, w_mean = fold.shared(statistics.abs_mean), fold.shared(weight_means(linears))
    grid = exponents(search)
    scales = fold.representable(grid_scales(grid, x_mean, w_mean) ** statistics.confidence)
    fitting = fold.fits(scales).tolist()
    usable = [index for index, fits in enumerate(fitting) if fits]
    spread = fold.spread(torch.cat([torch.ones_like(x_mean)[None], scales[usable]]))
    return Candidates([(0.0, 0.0), *(grid[index] for index in usable)], spread)


def rounding_losses(
    linears: list[ScaledLinear],
    scales: Tensor,
    moment: Tensor,
    dtype: torch.dtype,
    *,
    range_factor: float = 1.0,
) -> Tensor:
    """Expected squared output error of rounding `W diag(s)`, summed over the linears, for each row s of
    `scales`: (candidates,).

    The product with H runs in the dtype of `moment`, all else in float32. `range_factor` shrinks every
    group's range.
    """
    limit = ERRORS_AT_ONCE[moment.device.type]
    total = torch.zeros(len(scales), device=moment.device)
    for batch in batches_of(linears, limit):
        count = max(1, limit // sum(math.prod(linear.shape) for linear in batch))
        batch = [ScaledLinear.of(linear.weight, linear.scheme) for linear in batch]  # looked up once
        losses = []
        for some in torch.split(scales, count):
            errors = [linear.rounding_errors(some, dtype, range_factor, moment.dtype) for linear in batch]
            joined = torch.cat(errors, dim=1) if len(errors) > 1 else errors[0]
            losses.append(row_losses(joined.flatten(0, 1), moment).view(len(some), -1).sum(dim=1))
        total += torch.cat(losses)
    return total


def batches_of(linears: list[ScaledLinear], limit: int) -> Iterator[list[ScaledLinear]]:
    """Linears to be treated together, up to `limit` weights: one product for many small experts."""
    batch: list[ScaledLinear] = []
    for linear in linears:
        if batch and sum(math.prod(each.shape) for each in (*batch, linear)) > limit:
            yield batch
            batch = []
        batch.append(linear)
    yield batch


def ranking_dtype(device: torch.device) -> torch.dtype:
    """The dtype that ranks candidates: bfloat16 where the device multiplies it much faster than float32.

    Rounding H and the errors to eight bits moves a candidate's loss by far less than the candidates
    differ. Where many channels are summed up it compares the finalists too (see quick_dtype).
    """
    return torch.bfloat16 if has_bfloat16_products(device) else torch.float32


def sampled(linears: list[ScaledLinear], rows: int) -> list[ScaledLinear]:
    """Evenly spaced rows of each linear, about `rows` in all: a scale serves all rows, so some can vote."""
    stride = max(1, sum(linear.shape[0] for linear in linears) // rows)
    return [
        ScaledLinear.of(linear.weight[::stride].clone(memory_format=torch.contiguous_format), linear.scheme)
        for linear in linears
    ]


def search_scales(
    linears: list[ScaledLinear], statistics: InputStatistics, fold: Fold, search: SearchSpec
) -> ScaleChoice:
    """The scales of the grid with the smallest loss.

    All candidates are ranked on a sample of rows; the best few and the identity are compared on all rows.
    """
    tried, moment = candidates(linears, statistics, fold, search), statistics.moment
    quick = moment.to(ranking_dtype(moment.device))
    some = sampled(linears, SAMPLED_ROWS)
    finalists = rank(some, tried, quick, fold, input_noise(some, tried.scales, statistics))
    if quick_dtype(moment.device, len(moment)) != quick.dtype:
        quick = moment
    losses = rounding_losses(linears, tried.scales[finalists], quick, fold.dtype)
    losses += input_noise(linears, tried.scales[finalists], statistics)
    best = int(torch.where(torch.isfinite(losses), losses, torch.inf).argmin())
    ratio, weight_ratio = tried.ratios[finalists[best]]
    scales = tried.scales[finalists[best]]
    return ScaleChoice(scales, ratio, weight_ratio, float(losses[0]), float(losses[best]))


def rank(
    linears: list[ScaledLinear], tried: Candidates, moment: Tensor, fold: Fold, noise: Tensor
) -> list[int]:
    """The identity, which is the first candidate, and the best others by the loss on these rows.

    noise: (candidates,), what rounded inputs add to each.
    """
    losses = rounding_losses(linears, tried.scales, moment, fold.dtype) + noise
    losses = torch.where(torch.isfinite(losses), losses, torch.inf)
    order = losses[1:].argsort()[: FINALISTS - 1] + 1
    return [0, *order.tolist()]
