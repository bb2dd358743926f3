"""AWQ's scale search on statistics: no forward pass, so a candidate's cost is free of the token count.

For linears W_k that read x, scales s replace W by Q(W diag(s)) diag(1/s). Where the group's outputs are
linear in W the expected squared error is `sum_k tr(E_k H E_k^T)`, E_k the weight error and H = E[x x^T].
Candidates (AWQ, arXiv 2306.00978, section 3.2; duo scaling as AutoAWQ): s = xm^r and s = xm^r / wm^(1-r),
where xm is the mean of |x| and wm the mean normalised |w| of a channel. Ratio 0 without duo scaling is
the identity; it is always tried, so the search never does worse than plain rounding by this loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from app.core.format_limits import Scheme
from app.core.specs import SearchSpec
from workers.quantization.grid import grouped_view, min_max_grid
from workers.quantization.input_statistics import InputStatistics

MAX_SPREAD = 1e4  # largest s_max / s_min: a few extreme channels must not stretch all others
SAMPLED_ROWS = 512  # of a group's linears together, to rank candidates on
MAX_ROWS = 65536  # of errors at once
FINALISTS = 4  # candidates that are compared on all rows, the identity among them
FLOAT16_LIMIT = 0.25 * 65504  # headroom under float16's largest value for what is folded


@dataclass(frozen=True)
class ScaledLinear:
    """One balance layer of the search."""

    weight: Tensor  # (out_features, C) float32
    scheme: Scheme


@dataclass(frozen=True)
class ScaleChoice:
    """The best scales of a group, with what they are worth."""

    scales: Tensor  # (C,) float32
    ratio: float  # exponent of the activations' means
    weight_ratio: float  # exponent of the weights' means; 1 - ratio with duo scaling, else 0
    loss_identity: float  # plain rounding
    loss: float


@dataclass(frozen=True)
class Fold:
    """What absorbs the scales: decides which values they can take."""

    smooth_weight: Tensor  # (C',) of a norm, or (C', n) of a linear; float32, what it multiplies by
    is_norm: bool
    head_shape: tuple[int, int, int] | None  # (kv heads, repeats, head_dim) where heads share scales
    dtype: torch.dtype  # of the stored smooth weight
    offset: float = 0.0  # the norm adds it to what is stored

    def shared(self, values: Tensor) -> Tensor:
        """(C,) channel values averaged over the channels that must share a scale: (C',)."""
        return values if self.head_shape is None else values.view(self.head_shape).mean(dim=1).flatten()

    def spread(self, values: Tensor) -> Tensor:
        """(C',) values repeated to the channels of the balance layers: (C,)."""
        if self.head_shape is None:
            return values
        kv_heads, repeats, head_dim = self.head_shape
        return values.view(kv_heads, 1, head_dim).expand(kv_heads, repeats, head_dim).flatten()

    def representable(self, scales: Tensor) -> Tensor:
        """The nearest scales whose fold is exact: a norm's weight is stored in few bits, so take
        s = w / round(w / s), and the product of norm and balance layer is what it was. With an offset o
        the file holds w - o: s = w / (o + round(w / s - o))."""
        if not self.is_norm:
            return scales
        stored = (self.smooth_weight / scales - self.offset).to(self.dtype).to(torch.float32) + self.offset
        usable = torch.isfinite(stored) & (stored != 0) & (self.smooth_weight != 0)
        return torch.where(usable, self.smooth_weight / stored, torch.ones_like(scales))

    def fits(self, scales: Tensor) -> bool:
        """False if dividing by `scales` leaves float16's range, which servers compute in."""
        divisor = scales if self.smooth_weight.dim() == 1 else scales[:, None]
        return bool((self.smooth_weight / divisor).abs().amax() < FLOAT16_LIMIT)


def weight_means(linears: list[ScaledLinear]) -> Tensor:
    """(C,): mean over all rows of |w| divided by its group's largest."""
    total = torch.zeros(linears[0].weight.shape[1], device=linears[0].weight.device)
    rows = 0
    for linear in linears:
        size = grouped_view(linear.weight.abs(), linear.scheme)
        total += (size / size.amax(dim=-1, keepdim=True).clamp(min=1e-30)).sum(dim=0).flatten()
        rows += linear.weight.shape[0]
    return total / rows


def normalised(log_scales: Tensor, alive: Tensor) -> Tensor:
    """exp of the logarithms, centred between their extremes; 1 for dead channels.

    In logarithms neither the product of the extremes nor a power can leave the range of floats.
    """
    if not bool(alive.any()):
        return torch.ones_like(log_scales)
    live = log_scales[alive]
    middle = (live.max() + live.min()) / 2
    limit = torch.tensor(MAX_SPREAD, device=live.device).log() / 2
    return torch.where(alive, (log_scales - middle).clamp(-limit, limit), torch.zeros_like(log_scales)).exp()


Candidate = tuple[float, float, Tensor]  # ratio, weight_ratio, scales


def candidates(search: SearchSpec, x_mean: Tensor, w_mean: Tensor) -> Iterator[Candidate]:
    """The grid, identity first."""
    alive = (x_mean > 0) & (w_mean > 0)
    log_x = torch.where(alive, x_mean, 1.0).log()
    log_w = torch.where(alive, w_mean, 1.0).log()
    yield 0.0, 0.0, torch.ones_like(x_mean)
    ratios = [step / search.grid_points for step in range(search.grid_points + 1)]
    if search.duo_scaling is not True:
        for ratio in ratios[1:]:
            yield ratio, 0.0, normalised(ratio * log_x, alive)
    if search.duo_scaling is not False:
        # Ratio 1 is the same with and without the weights.
        for ratio in ratios if search.duo_scaling is True else ratios[:-1]:
            yield ratio, 1 - ratio, normalised(ratio * log_x - (1 - ratio) * log_w, alive)


def rounding_loss(
    linears: list[ScaledLinear],
    scales: Tensor,
    moment: Tensor,
    dtype: torch.dtype,
    *,
    range_factor: float = 1.0,
) -> Tensor:
    """Expected squared output error of rounding `W diag(scales)`, summed over the linears; a scalar.

    The product with H runs in the dtype of `moment`, all else in float32. `range_factor` shrinks every
    group's range.
    """
    total = torch.zeros((), device=moment.device)
    for part in parts(linears):
        errors = []
        for linear in part:
            scaled = grouped_view(linear.weight * scales, linear.scheme)
            grid = min_max_grid(scaled, linear.scheme, dtype, factor=range_factor)
            rounded = grid.nearest(scaled)
            errors.append(rounded.view_as(linear.weight).div_(scales).sub_(linear.weight))
        error = torch.cat(errors) if len(errors) > 1 else errors[0]
        total += ((error.to(moment.dtype) @ moment) * error).sum(dtype=torch.float32)
    return total


def parts(linears: list[ScaledLinear]) -> Iterator[list[ScaledLinear]]:
    """Linears to be treated together: of many experts only so many that the errors stay small."""
    part: list[ScaledLinear] = []
    for linear in linears:
        if part and sum(each.weight.shape[0] for each in part) + linear.weight.shape[0] > MAX_ROWS:
            yield part
            part = []
        part.append(linear)
    yield part


def ranking_dtype(device: torch.device) -> torch.dtype:
    """What candidates are ranked in: bfloat16 where the device multiplies it much faster than float32.

    Rounding H and the errors to eight bits moves a candidate's loss by far less than the candidates
    differ; the finalists are compared in float32.
    """
    if device.type == "cuda" or cpu_has_amx():
        return torch.bfloat16
    return torch.float32


@cache
def cpu_has_amx() -> bool:
    """True on CPUs with matrix units for bfloat16 (Linux tells)."""
    path = Path("/proc/cpuinfo")
    return path.exists() and " amx_bf16" in path.read_text("utf-8")


def sampled(linears: list[ScaledLinear], rows: int) -> list[ScaledLinear]:
    """Evenly spaced rows of each linear, about `rows` in all: a scale serves all rows, so some can vote."""
    stride = max(1, sum(linear.weight.shape[0] for linear in linears) // rows)
    return [ScaledLinear(linear.weight[::stride].contiguous(), linear.scheme) for linear in linears]


def search_scales(
    linears: list[ScaledLinear], statistics: InputStatistics, fold: Fold, search: SearchSpec
) -> ScaleChoice:
    """The scales of the grid with the smallest loss.

    All candidates are ranked on a sample of rows; the best few and the identity are compared on all rows.
    """
    x_mean = fold.shared(statistics.abs_mean)
    w_mean = fold.shared(weight_means(linears))
    tried: list[Candidate] = []
    for ratio, weight_ratio, raw in candidates(search, x_mean, w_mean):
        scales = (
            fold.representable(raw**statistics.confidence) if tried else raw
        )  # the identity is exact as it is
        if not tried or fold.fits(scales):
            tried.append((ratio, weight_ratio, fold.spread(scales)))
    finalists = rank(sampled(linears, SAMPLED_ROWS), tried, statistics.second_moment, fold)
    exact = [
        rounding_loss(linears, tried[index][2], statistics.second_moment, fold.dtype) for index in finalists
    ]
    loss = torch.stack(exact)
    best = int(torch.where(torch.isfinite(loss), loss, torch.inf).argmin())
    ratio, weight_ratio, scales = tried[finalists[best]]
    return ScaleChoice(scales, ratio, weight_ratio, float(loss[0]), float(loss[best]))


def rank(linears: list[ScaledLinear], tried: list[Candidate], moment: Tensor, fold: Fold) -> list[int]:
    """The identity, which is the first candidate, and the best others by the loss on these rows."""
    ranking = moment.to(ranking_dtype(moment.device))
    losses = torch.stack([rounding_loss(linears, scales, ranking, fold.dtype) for _, _, scales in tried])
    losses = torch.where(torch.isfinite(losses), losses, torch.inf)
    order = losses[1:].argsort()[: FINALISTS - 1] + 1
    return [0, *order.tolist()]
