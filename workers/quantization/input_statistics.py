"""Statistics of a layer's activations from calibration: all that search and rounding need.

Per group of linears with one input x: the mean of |x| and the second moment H = mean of x x^T, float32, which
is called `moment` wherever it goes. On a GPU the products take 16-bit inputs as they are and add up in
float32, so nothing is lost but order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import overload

import torch
from torch import Tensor, nn

from app.core.errors import ModelRefused
from app.core.planning.architectures import Architecture, ScaleGroup
from workers.modeling.experts import SplitExperts
from workers.modeling.stored_bytes import ScratchFile
from workers.quantization.cache_range import CacheRange
from workers.quantization.grid import FLOAT16_LIMIT
from workers.quantization.inverse_triangle import inverse_lower
from workers.quantization.reduction import ALONE, Ranks

EXPERT_TOKENS = 256  # fewer tokens than this say too little about an expert's input
CORRECTION_DAMPING = 0.01  # of the mean diagonal, added to it
# Columns per block of the second moment; only blocks on and above the diagonal are computed.
BLOCK = {"cpu": 256, "cuda": 1024}
SIZES_ROWS = 256  # of an input, whose absolute values are taken at a time
# Tokens whose products a CPU adds up at a time: of more, oneDNN lets each thread sum a share, and the number
# of threads would be seen in the last digits.
SUMMED_ROWS = 1024


@dataclass(frozen=True)
class InputStatistics:
    """Of one group's input with C channels.

    In the quantized copy of a recipe that is calibrated on its own errors: of the input as the folded linears
    read it, with what the copy lacks of the original.
    """

    abs_mean: Tensor  # (C,) float32
    moment: Tensor  # (C, C) float32, symmetric
    num_tokens: int
    routed_tokens: int | None = None  # of an expert: how many of them were routed to it
    all_shown: bool = False  # of an expert: it was shown every token
    input_drift: Tensor | None = None  # (C, C): mean of (original input - own input) times own input
    output_drift: Tensor | None = None  # (rows, C): mean of what the residual stream lacks times own input
    abs_max: Tensor | None = None  # (C,) float32: the largest |x|

    @property
    def confidence(self) -> float:
        """1 where the tokens represent the linears' inputs, 0 for an expert that no token was routed to."""
        if self.routed_tokens is None or self.all_shown:
            return 1.0
        return min(1.0, self.routed_tokens / EXPERT_TOKENS)

    def scaled(self, scales: Tensor | None) -> InputStatistics:
        """Statistics of the input as linears with these scales folded in read it."""
        if scales is None:
            return self
        moment = self.moment / torch.outer(scales, scales)
        abs_max = None if self.abs_max is None else self.abs_max / scales
        return replace(self, abs_mean=self.abs_mean / scales, moment=moment, abs_max=abs_max)

    def corrected(self, weight: Tensor) -> Tensor:
        """The weights (rows, C) that bring the output nearest to the original's; unchanged if none can.

        The correction is the ridge regression of what is missing on the input, and shrinks where the tokens
        are few for the number of channels.
        """
        if self.output_drift is not None:
            drift = self.output_drift
        elif self.input_drift is not None:
            drift = weight @ self.input_drift
        else:
            return weight
        damped = self.moment.clone()
        damped.diagonal().add_(CORRECTION_DAMPING * damped.diagonal().mean())
        inverse, failed = inverse_lower(damped)
        if bool(failed):
            return weight
        trust = self.num_tokens / (self.num_tokens + weight.shape[1])
        corrected = weight + trust * (drift @ inverse.T @ inverse)
        # Also false for what is not a number.
        return corrected if bool(corrected.abs().amax() <= FLOAT16_LIMIT) else weight

    def to(self, device: torch.device) -> InputStatistics:
        abs_max = None if self.abs_max is None else self.abs_max.to(device)
        return replace(
            self, abs_mean=self.abs_mean.to(device), moment=self.moment.to(device), abs_max=abs_max
        )


class GroupStatistics(Sequence[InputStatistics]):
    """Statistics by group, each made when it is looked up: those of all experts may be too many to hold."""

    def __init__(self, makers: Sequence[Callable[[], InputStatistics]]) -> None:
        self.makers = makers
        self.last: tuple[int, InputStatistics] | None = None

    def __len__(self) -> int:
        return len(self.makers)

    @overload
    def __getitem__(self, index: int) -> InputStatistics: ...
    @overload
    def __getitem__(self, index: slice) -> GroupStatistics: ...
    def __getitem__(self, index: int | slice) -> InputStatistics | GroupStatistics:
        if isinstance(index, slice):
            return GroupStatistics(self.makers[index])
        if self.last is None or self.last[0] != index:
            self.last = None  # let go before the next one is made
            self.last = (index, self.makers[index]())
        return self.last[1]


@dataclass(frozen=True)
class LayerStatistics:
    """A layer's statistics from a calibration pass, per group, and one window for self-checks."""

    groups: Sequence[InputStatistics]
    probe: tuple[Tensor, Tensor]  # the layer's input and output, (1, tokens, hidden)
    cache: CacheRange | None = None  # of keys and values, where anybody asks for it and the layer has them

    def to(self, device: torch.device) -> LayerStatistics:
        groups: Sequence[InputStatistics] = self.groups
        if isinstance(groups, GroupStatistics):
            groups = GroupStatistics([partial(moved, maker, device) for maker in groups.makers])
        else:
            groups = [group.to(device) for group in groups]
        cache = None if self.cache is None else self.cache.to(device)
        return LayerStatistics(groups, (self.probe[0].to(device), self.probe[1].to(device)), cache)


def moved(maker: Callable[[], InputStatistics], device: torch.device) -> InputStatistics:
    return maker().to(device)


class InputCollector:
    """Running sums over the batches of one input; with `file` the large one lies there between them."""

    def __init__(self, *, samples: bool = False, file: ScratchFile | None = None) -> None:
        self.samples, self.sample = samples, list[Tensor]()
        self.file = file
        self.start: int | None = None  # in the file
        self.routed_tokens: int | None = None
        self.all_shown = False
        self.abs_sum: Tensor | None = None
        self.abs_max: Tensor | None = None
        self._moment: Tensor | None = None
        self.num_tokens = 0
        self.weight = 0.0  # of all tokens

    @property
    def moment(self) -> Tensor | None:
        """The sum of products of channels; of one that lies in a file a copy."""
        if self.file is None or self.start is None:
            return self._moment
        assert self.abs_sum is not None
        channels = len(self.abs_sum)
        return self.file.read(self.start, torch.empty(channels, channels)).to(self.abs_sum.device)

    @moment.setter
    def moment(self, total: Tensor) -> None:
        if self.file is None:
            self._moment = total
        else:
            self.start = self.file.write(total.cpu(), self.start)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """x: (..., C); weights: (tokens,), by which their squares count, one each by default."""
        rows = x.reshape(-1, x.shape[-1])
        if self.samples and sum(map(len, self.sample)) < EXPERT_TOKENS:
            seen = rows[rows.any(-1)]  # rows of zeros stand for tokens that an expert does not get
            self.sample.append(seen[:: max(1, len(seen) // EXPERT_TOKENS)][:EXPERT_TOKENS].clone())
        if rows.device.type == "cpu":
            rows = rows.to(torch.float32)
        moment = self.moment
        if self.abs_sum is None or moment is None:
            self.abs_sum, moment = empty_sums(rows.shape[1], rows.device)
        self.add_sizes(rows, weights)
        if weights is None:
            self.weight += len(rows)
        else:
            self.weight += float(weights.sum())
            rows = rows * weights.sqrt()[:, None]
        for start, stop in blocks(moment):
            add_product(moment[start:stop, start:], rows[:, start:stop], rows[:, start:])
        self.moment = moment
        self.num_tokens += rows.shape[0]

    def add_sizes(self, rows: Tensor, weights: Tensor | None) -> None:
        """Sums and maxima of |x|: few rows at a time stay in a processor's cache."""
        assert self.abs_sum is not None
        at_once = SIZES_ROWS if rows.device.type == "cpu" else max(1, len(rows))
        largest = torch.zeros_like(self.abs_sum) if self.abs_max is None else self.abs_max
        for start in range(0, len(rows), at_once):
            sizes = rows[start : start + at_once].abs()
            largest = torch.maximum(largest, sizes.amax(dim=0).to(torch.float32))
            if weights is None:
                self.abs_sum += sizes.sum(dim=0, dtype=torch.float32)
            else:
                self.abs_sum += weights[start : start + at_once] @ sizes
        if len(rows):
            self.abs_max = largest

    def add_up(self, ranks: Ranks) -> None:
        """The sums over the batches of all ranks; the first one gets them."""
        if ranks.size == 1:
            return
        assert self.abs_sum is not None
        moment = self.moment
        assert moment is not None
        counts = torch.tensor(
            [self.num_tokens, self.weight, self.routed_tokens or 0], dtype=torch.float64, device=moment.device
        )
        ranks.add_up([self.abs_sum, moment, counts])
        self.abs_max = torch.zeros_like(self.abs_sum) if self.abs_max is None else self.abs_max
        ranks.take_largest(self.abs_max)
        self.moment = moment
        self.num_tokens, self.weight = int(counts[0]), float(counts[1])
        if self.routed_tokens is not None:
            self.routed_tokens = int(counts[2])

    def result(self, name: str) -> InputStatistics:
        """Raises ModelRefused if the activations overflowed: no scale can be found on infinity."""
        assert self.abs_sum is not None
        moment = self.moment
        assert moment is not None
        moment.div_(self.weight)
        for start, stop in blocks(moment):
            upper = moment[start:stop, start:stop].triu()
            moment[start:stop, start:stop] = upper + upper.triu(1).T
            moment[stop:, start:stop] = moment[start:stop, stop:].T
        # A product of two channels is no larger than their squares: the diagonal tells.
        if not bool(torch.isfinite(moment.diagonal()).all()):
            raise ModelRefused(
                f"the input of {name} is not finite on the calibration text",
                code="activations_not_finite",
                remedy="check that the model gives finite outputs in its own dtype",
            )
        return InputStatistics(
            self.abs_sum / self.weight, moment, self.num_tokens, self.routed_tokens, self.all_shown,
            abs_max=self.abs_max,
        )  # fmt: skip


def empty_sums(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of |x|, and of products of channels."""
    return torch.zeros(channels, device=device), torch.zeros(channels, channels, device=device)


def blocks(moment: Tensor) -> Iterator[tuple[int, int]]:
    """First and last column of each block."""
    channels, size = moment.shape[0], BLOCK[moment.device.type]
    for start in range(0, channels, size):
        yield start, min(start + size, channels)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left.T @ right, (tokens, C) both, in float32 whatever their dtype."""
    if left.device.type != "cpu":
        if left.dtype == torch.float32:
            total.addmm_(left.T, right)
        else:
            total += torch.mm(left.T, right, out_dtype=torch.float32)
        return
    for some, others in zip(torch.split(left, SUMMED_ROWS), torch.split(right, SUMMED_ROWS), strict=True):
        total.addmm_(some.T, others)


def results(collectors: Sequence[InputCollector], names: Sequence[str]) -> Sequence[InputStatistics]:
    """Of each collector, for an input that is called by these names; what lies in a file stays there."""
    if all(collector.file is None for collector in collectors):
        return [collector.result(name) for collector, name in zip(collectors, names, strict=True)]

    def maker(collector: InputCollector, name: str) -> Callable[[], InputStatistics]:
        if collector.file is not None:
            return partial(collector.result, name)
        ready = collector.result(name)
        return lambda: ready

    return GroupStatistics([maker(*pair) for pair in zip(collectors, names, strict=True)])


@contextmanager
def collecting(
    layer: nn.Module, architecture: Architecture, ranks: Ranks = ALONE, scratch: Path | None = None
) -> Iterator[list[InputCollector]]:
    """Collect the input of each group while `layer` runs; one collector a group.

    Afterwards the collectors of the first rank hold what the layer saw on all ranks. With `scratch` the sums
    of experts lie in a file there, which ends with the collectors.
    """
    feeding = {feeding_group(architecture, group) for group in architecture.groups if group.expert}
    file = None if scratch is None else ScratchFile(scratch)
    collectors = [
        InputCollector(samples=index in feeding, file=None if group.expert is None else file)
        for index, group in enumerate(architecture.groups)
    ]

    def observe(collector: InputCollector):  # type: ignore[no-untyped-def]  # a hook of torch
        return lambda _module, inputs: collector.add(inputs[0])

    hooks = [
        layer.get_submodule(architecture.module_name(group.source)).register_forward_pre_hook(
            observe(collector)
        )
        for group, collector in zip(architecture.groups, collectors, strict=True)
    ]
    blocks = [module for module in layer.modules() if isinstance(module, SplitExperts)]
    for block in blocks:
        block.observed, block.routed = True, [0] * block.form.count
    try:
        yield collectors
        count_routed(layer, architecture, collectors)
        add_up(layer, architecture, collectors, ranks)
        if ranks.is_first:
            complete_experts(layer, architecture, collectors)
    finally:
        for hook in hooks:
            hook.remove()
        for block in blocks:
            block.observed = False


def add_up(
    layer: nn.Module, architecture: Architecture, collectors: Sequence[InputCollector], ranks: Ranks
) -> None:
    """Sum over the ranks, also for experts that none of this rank's tokens went to."""
    if ranks.size == 1:
        return
    for group, collector in zip(architecture.groups, collectors, strict=True):
        linear = layer.get_submodule(architecture.module_name(group.balance_layers[0]))
        assert isinstance(linear.weight, Tensor)
        if collector.abs_sum is None:
            collector.abs_sum, collector.moment = empty_sums(linear.weight.shape[1], linear.weight.device)
        collector.add_up(ranks)


def count_routed(layer: nn.Module, architecture: Architecture, collectors: Sequence[InputCollector]) -> None:
    """Of each expert the tokens that this rank's router sent to it."""
    for group, collector in zip(architecture.groups, collectors, strict=True):
        if group.expert is not None:
            path, _, number = architecture.module_name(group.expert).rpartition(".")
            block = layer.get_submodule(path)
            assert isinstance(block, SplitExperts)
            collector.routed_tokens, collector.all_shown = block.routed[int(number)], block.shows_all


def feeding_group(architecture: Architecture, group: ScaleGroup) -> int:
    """The group whose input is that of the expert: it holds the expert's first linears."""
    return next(
        index
        for index, other in enumerate(architecture.groups)
        if other.expert is None and any(name.startswith(f"{group.expert}.") for name in other.balance_layers)
    )


def complete_experts(layer: nn.Module, architecture: Architecture, collectors: list[InputCollector]) -> None:
    """Show experts that saw few tokens some of those that went to others, so that each has statistics."""
    for group, collector in zip(architecture.groups, collectors, strict=True):
        if group.expert is not None and not collector.all_shown:
            missing = EXPERT_TOKENS - collector.num_tokens
            if missing > 0:
                others = torch.cat(collectors[feeding_group(architecture, group)].sample)
                layer.get_submodule(architecture.module_name(group.expert))(others[:missing])
