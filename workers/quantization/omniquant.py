"""OmniQuant: ranges and scales of a whole decoder layer, learned by gradient descent on its output.

Shao et al., arXiv 2308.13137. Learnable weight clipping: the two bounds of every group move. Learnable
equivalent transformation: the scales between layers move; they are folded as scales always are, so nothing
is left at run time. Rounding passes its gradient straight through. The loss is the mean squared difference
between the quantized layer's output on the inputs of the quantized chain and the original layer's output.

Learning starts from the clip search, or from GPTQ's integers. A second part, not in the paper, keeps the
integers of the best epoch and goes on with the width of each group alone: no integer flips, so its gradient
is exact. The best epoch by the loss on windows that are held back from learning is kept, and the start counts
as one: what only fits the text that it was learned from is not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from app.core.jobs.report import LearningReport
from app.core.planning.architectures import Architecture
from kernels.search.grids import stored_scale
from workers.modeling.quantized_weight import QuantizedWeight
from workers.quantization.folding import Heads, fold_of, fold_scales
from workers.quantization.scale_search import ScaleChoice

RANGE_RATE = 4e-4  # of AdamW, for the logarithms of the bounds
SCALE_RATE = 1e-4  # for the logarithms of the scales
WIDTH_RATE = 1.5e-2  # for the logarithms of the widths, with fixed integers
STRAIGHT_SHARE = 4  # one of so many epochs moves bounds and scales, the others the widths

Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]  # layer weights, states -> outputs


@dataclass(frozen=True)
class Lesson:
    """A layer's training data: states of the quantized chain, and outputs of the original layer."""

    inputs: list[Tensor]  # per batch: (windows, tokens, hidden)
    targets: list[Tensor]
    held_back: int  # of the batches, the last ones: they judge and are not learned from
    forward: Forward

    @property
    def learned(self) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets of the batches that are learned from."""
        return self.batches[: len(self.inputs) - self.held_back]

    @property
    def judging(self) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets that rate the epochs: all batches if the text is too short to hold any back."""
        return self.batches[-self.held_back :]

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.inputs, self.targets, strict=True))


def windows(batches: list[tuple[Tensor, Tensor]]) -> int:
    return sum(inputs.shape[0] for inputs, _ in batches)


@dataclass(frozen=True)
class Draft:
    """A layer as the search left it."""

    architecture: Architecture
    heads: Heads
    dtype: torch.dtype  # of the checkpoint's weights
    weights: dict[str, Tensor]  # with all scales folded in, what each linear should come near to
    scaled: tuple[bool, ...]  # by group: whether its scales may move
    quantized: dict[str, QuantizedWeight]


@dataclass(frozen=True)
class Learned:
    """The best that was found."""

    scales: list[ScaleChoice | None]  # by group, on top of those that were folded in before
    quantized: dict[str, QuantizedWeight]
    report: LearningReport


@dataclass(frozen=True)
class Snapshot:
    """Scales and integers as they would be stored."""

    scales: list[ScaleChoice | None]
    quantized: dict[str, QuantizedWeight]


class LearnableLayer:
    """The bounds, scales and widths of one layer."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.bounds = {
            name: torch.zeros(2, *weight.scale.shape, 1, device=weight.scale.device)
            for name, weight in draft.quantized.items()
        }
        self.shifts: list[Tensor | None] = [
            draft.weights[group.balance_layers[0] + ".weight"].new_zeros(self.free_scales(index))
            if scaled
            else None
            for index, (group, scaled) in enumerate(zip(draft.architecture.groups, draft.scaled, strict=True))
        ]

    def free_scales(self, index: int) -> int:
        """How many scales a group has: heads that share a key and value share theirs."""
        shape = self.head_shape(index)
        channels = self.draft.weights[
            self.draft.architecture.groups[index].balance_layers[0] + ".weight"
        ].shape[1]
        return channels if shape is None else shape[0] * shape[2]

    def head_shape(self, index: int) -> tuple[int, int, int] | None:
        draft = self.draft
        return fold_of(draft.weights, draft.heads, draft.architecture.groups[index], draft.dtype).head_shape

    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.bounds.values()), [shift for shift in self.shifts if shift is not None]

    def choices(self) -> list[ScaleChoice | None]:
        """The scales as learned so far."""
        return [
            None if shift is None else as_choice(self.spread(index, shift.exp()))
            for index, shift in enumerate(self.shifts)
        ]

    def spread(self, index: int, scales: Tensor) -> Tensor:
        """One scale per channel of the balance layers."""
        shape = self.head_shape(index)
        if shape is None:
            return scales
        return scales.view(shape[0], 1, shape[2]).expand(shape).reshape(-1)

    def folded(self, choices: list[ScaleChoice | None]) -> dict[str, Tensor]:
        draft = self.draft
        return dict(fold_scales(draft.weights, draft.heads, draft.architecture.groups, choices))

    def rounded(self) -> dict[str, Tensor]:
        """The layer's weights, scaled and rounded, with gradients to bounds and scales."""
        weights = self.folded(self.choices())
        for name in self.bounds:
            scale, zero = self.grid(name)
            grouped = weights[name + ".weight"].view(*scale.shape[:2], -1)
            steps = grouped / scale
            top = 2 ** self.draft.quantized[name].scheme.bits - 1
            integers = (straight(steps, steps.round()) + zero).clamp(0, top)
            weights[name + ".weight"] = ((integers - zero) * scale).view_as(weights[name + ".weight"])
        return weights

    def grid(self, name: str) -> tuple[Tensor, Tensor]:
        """Scale and zero point between the bounds as learned so far, (rows, groups, 1) each."""
        start, (low_shift, high_shift) = self.draft.quantized[name], self.bounds[name]
        scale, zero = start.scale[..., None], start.zero[..., None].float()
        top = 2**start.scheme.bits - 1
        if start.scheme.symmetric:
            learned = scale * ((low_shift + high_shift) / 2).exp()
            return straight(learned, stored_scale(learned, self.draft.dtype)), zero
        low, high = -zero * scale * low_shift.exp(), (top - zero) * scale * high_shift.exp()
        learned = (high - low) / top
        learned = straight(learned, stored_scale(learned, self.draft.dtype))
        point = -low / learned
        return learned, straight(point, point.round().clamp(0, top))

    @torch.no_grad()
    def snapshot(self) -> Snapshot:
        """The weights and scales as they would be stored now."""
        draft = self.draft
        choices = [
            choice if choice is None else self.representable(index, choice)
            for index, choice in enumerate(self.choices())
        ]
        weights, quantized = self.folded(choices), {}
        for name, start in draft.quantized.items():
            scale, zero = self.grid(name)
            grouped = weights[name + ".weight"].view(*scale.shape[:2], -1)
            integers = ((grouped / scale).round() + zero).clamp(0, 2**start.scheme.bits - 1)
            quantized[name] = QuantizedWeight(
                integers.view_as(weights[name + ".weight"]).to(torch.uint8),
                scale.squeeze(-1),
                zero.squeeze(-1).to(torch.uint8),
                start.scheme,
            )
        return Snapshot(choices, quantized)

    def representable(self, index: int, choice: ScaleChoice) -> ScaleChoice:
        """The scales that the smooth layer can hold exactly."""
        draft = self.draft
        fold = fold_of(draft.weights, draft.heads, draft.architecture.groups[index], draft.dtype)
        return replace(choice, scales=fold.representable(choice.scales))


def as_choice(scales: Tensor) -> ScaleChoice:
    return ScaleChoice(scales, 0.0, 0.0, 0.0, 0.0)


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` forward, the gradient of `value` backward."""
    return value + (rounded - value).detach()


class Teacher:
    """Trains one layer and keeps its best state."""

    def __init__(self, draft: Draft, lesson: Lesson) -> None:
        self.draft, self.lesson = draft, lesson
        self.layer = LearnableLayer(draft)
        self.best = Snapshot([None] * len(draft.architecture.groups), draft.quantized)
        self.loss_start = self.loss = self.measured(self.best)
        self.steps = 0

    def teach(self, epochs: int, *, fixed_integers: bool) -> Learned:
        """Bounds and scales for a part of the epochs, unless GPTQ has chosen the integers; then widths."""
        bounds, shifts = self.layer.parameters()
        groups: list[dict[str, object]] = [{"params": bounds, "lr": RANGE_RATE}]
        groups += [{"params": shifts, "lr": SCALE_RATE}] if shifts else []
        first = 0 if fixed_integers else epochs // STRAIGHT_SHARE
        for _ in self.epochs(groups, self.layer.rounded, first):
            self.keep(self.layer.snapshot())
        widths = {name: torch.zeros_like(weight.scale) for name, weight in self.best.quantized.items()}
        fixed = self.best
        groups = [{"params": list(widths.values()), "lr": WIDTH_RATE}]
        for _ in self.epochs(groups, lambda: self.widened(fixed, widths), epochs - first):
            self.keep(self.with_widths(fixed, widths))
        report = LearningReport(
            windows=windows(self.lesson.learned),
            judged_on=windows(self.lesson.judging),
            steps=self.steps,
            loss_start=self.loss_start,
            loss=self.loss,
        )
        return Learned(self.best.scales, self.best.quantized, report)

    def epochs(
        self, groups: list[dict[str, object]], weights: Callable[[], dict[str, Tensor]], count: int
    ) -> Iterator[int]:
        """Descend, with rates that fall to zero; ends early where a loss is not finite."""
        for group in groups:
            for parameter in group["params"]:  # type: ignore[attr-defined]
                parameter.requires_grad_()
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        total = max(1, count * len(self.lesson.learned))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        for epoch in range(count):
            for inputs, targets in self.lesson.learned:
                optimizer.zero_grad()
                with torch.enable_grad():
                    loss = mse_loss(self.lesson.forward(weights(), inputs).float(), targets.float())
                    if not bool(torch.isfinite(loss)):
                        return
                    loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                self.steps += 1
            yield epoch

    def keep(self, snapshot: Snapshot) -> None:
        """Remember it if it is the best so far."""
        loss = self.measured(snapshot)
        if loss < self.loss:
            self.best, self.loss = snapshot, loss

    @torch.no_grad()
    def measured(self, snapshot: Snapshot) -> float:
        """The loss on what is held back, of the weights as they would be stored."""
        weights, judging = self.stored(snapshot), self.lesson.judging
        total = 0.0
        for inputs, targets in judging:
            output = self.lesson.forward(weights, inputs).float()
            total += float(mse_loss(output, targets.float())) * inputs.shape[0]
        return total / windows(judging)

    def stored(self, snapshot: Snapshot) -> dict[str, Tensor]:
        weights = {
            name: value.to(self.draft.dtype).to(torch.float32)
            for name, value in self.layer.folded(snapshot.scales).items()
        }
        linears = {name + ".weight": weight.dequantize() for name, weight in snapshot.quantized.items()}
        return {**weights, **linears}

    def widened(self, fixed: Snapshot, widths: dict[str, Tensor]) -> dict[str, Tensor]:
        """The stored weights with the groups' widths as learned so far, with gradients to them."""
        weights = self.stored(fixed)
        for name, weight in fixed.quantized.items():
            scale = weight.scale * widths[name].exp()
            scale = straight(scale, stored_scale(scale, self.draft.dtype))
            steps = weight.q.view(*weight.scale.shape, -1).float() - weight.zero[..., None].float()
            weights[name + ".weight"] = (steps * scale[..., None]).view_as(weights[name + ".weight"])
        return weights

    @torch.no_grad()
    def with_widths(self, fixed: Snapshot, widths: dict[str, Tensor]) -> Snapshot:
        """`fixed` with the groups' widths as learned so far."""
        quantized = {
            name: replace(weight, scale=stored_scale(weight.scale * widths[name].exp(), self.draft.dtype))
            for name, weight in fixed.quantized.items()
        }
        return Snapshot(fixed.scales, quantized)
