"""The calibration text on its way through the original model and through its quantized copy, side by side.

A layer of the copy gets inputs that the quantized layers before it have changed. Rounding it to reproduce
its own weights would keep that damage. What it should reproduce is what the original gives for the same
token, so each group of linears is observed in both models: the second moment of its input in the copy, and
the expected product of what is missing in its output with that input. Groups are observed in turn, the
linears before them rounded already, so `o` sees what became of `v`, and `down` what became of `up`.

Some tokens, often the first, have a residual stream hundreds of times as large as others, and would decide
alone. Norms see errors relative to the stream; but all tokens attend to such a one, so it must be more exact.
So squared errors of what is added to the stream count by one over its size, half way between both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from app.core.planning.architectures import LAYER_OUTPUT, Architecture, ScaleGroup
from workers.modeling.decoder import Decoder
from workers.modeling.layer_calls import LayerArguments, LayerCall, rebuilt
from workers.modeling.layer_weights import Weights
from workers.quantization.calibration import CalibrationPass
from workers.quantization.input_statistics import (
    InputCollector,
    InputStatistics,
    add_product,
    collecting,
    results,
)
from workers.quantization.observation import References, reference_names, watching, watching_names
from workers.quantization.omniquant import Lesson
from workers.quantization.reduction import ALONE, Ranks
from workers.quantization.replay import Settled, SettledOutputs, can_be_silent

LESSON_WINDOWS = 32  # of the calibration text, that a layer is taught with
HELD_BACK = 5  # one of so many further parts of it judges what was learned
STEP_WINDOWS = 4  # per step


class PairedPass:
    """Hidden states of both models before `layer`.

    Of several ranks each holds its share of `batches`. All take part in what is observed and taught; the
    first one gets it.
    """

    def __init__(self, decoder: Decoder, batches: list[Tensor], ranks: Ranks = ALONE) -> None:
        self.decoder, self.layer, self.ranks = decoder, 0, ranks
        self.windows = [batch.shape[0] for batch in batches]  # of each batch of all ranks
        self.size = min(STEP_WINDOWS, self.windows[0])  # of a lesson's parts
        self.references: References = []  # of the present layer, once it is observed
        self.run: CalibrationPass | None = None  # through the original model, one layer ahead
        self.replay = SettledOutputs()  # of the present layer of the copy
        with torch.no_grad():
            sections = [batches[batch][first : first + self.size] for batch, first in self.lesson_sections()]
            further = sections if ranks.is_first else []
            self.original, self.calls = decoder.start(ranks.share(batches), further=further)
        self.own, self.original_calls = list(self.original), self.calls.fork()

    @property
    def at_head(self) -> bool:
        """Whether it is behind all layers, before the head's step."""
        return self.decoder.architecture.is_head(self.layer)

    @torch.no_grad()
    def advance(self, original: Weights, own: Weights) -> None:
        """Both models by one layer."""
        references, self.references = self.referenced(original), []
        for index, values in enumerate(references):
            self.original[index] = values[LAYER_OUTPUT].view_as(self.original[index])
        with self.decoder.layer(self.layer, own) as module, self.replaying(module, own, None) as begin:
            for index, batch in enumerate(self.own):
                begin(index)
                self.own[index] = self.call(index)(module, batch)
        self.replay.clear()
        self.layer += 1

    @contextmanager
    def replaying(
        self, module: nn.Module, own: Weights, first: int | None, silent: str | None = None
    ) -> Iterator[Callable[[int], None]]:
        """Let modules of the present layer replay; groups from the `first` on are not rounded yet."""
        if not self.replays:
            yield lambda batch: None
            return
        settled = Settled.before(self.architecture, first, silent)
        with self.replay.running(module, own, settled) as begin:
            yield begin

    @property
    def replays(self) -> bool:
        """Whether modules of the present layer can replay.

        Experts get other tokens when their router's input changes; what a layer hands on is a side effect.
        """
        return not self.at_head and self.architecture.experts is None and not self.calls.carries

    @property
    def architecture(self) -> Architecture:
        """With the groups of the present layer."""
        return self.decoder.architecture.at(self.layer)

    def read_from(self, run: CalibrationPass) -> None:
        """Take what the original gives from a pass that collects each layer before this one comes to it."""
        self.run, run.refers = run, True
        self.original_calls = run.calls

    def referenced(self, original: Weights) -> References:
        """Of each batch in the original: what groups read or join, and the output; one run a layer."""
        if not self.references and self.run is not None and self.run.layer == self.layer + 1:
            self.references = self.run.references
        if not self.references:
            architecture = self.decoder.architecture.at(self.layer)
            with (
                self.decoder.layer(self.layer, original) as module,
                watching_names(module, architecture, reference_names(architecture)) as seen,
            ):
                self.references = [
                    seen.reference(module, batch, self.original_calls.of(index, self.layer))
                    for index, batch in enumerate(self.original)
                ]
        return self.references

    def call(self, index: int) -> LayerCall:
        """The present layer of the copy on a batch."""
        return self.calls.of(index, self.layer)

    @torch.no_grad()
    def observe(
        self, groups: Sequence[int], original: Weights, own: Weights, scales: Sequence[Tensor | None]
    ) -> Sequence[InputStatistics]:
        """The groups' statistics; `scales` divide the inputs of each group in the copy."""
        architecture = self.architecture
        chosen = [architecture.groups[index] for index in groups]
        if any(group.expert is not None for group in chosen):
            return self.observe_experts(groups, own)
        watched = [Drift(group, factor) for group, factor in zip(chosen, scales, strict=True)]
        references = self.referenced(original)
        with self.decoder.layer(self.layer, own) as module, watching(module, architecture, chosen) as seen:
            silent = self.silent_linear(module, chosen)
            with self.replaying(module, own, min(groups), silent) as begin:
                for index, (mine, theirs) in enumerate(zip(self.own, references, strict=True)):
                    begin(index)
                    own_values = seen.run(module, {}, mine, self.call(index))
                    for drift in watched:
                        drift.add(theirs, own_values)
        for drift in watched:
            drift.add_up(self.ranks)
        if not self.ranks.is_first:
            return []
        prefix = architecture.layer_prefix(self.layer)
        weight = None if silent is None else own[silent + ".weight"]
        return [drift.result(prefix + drift.group.balance_layers[0], weight) for drift in watched]

    def silent_linear(self, module: nn.Module, groups: Sequence[ScaleGroup]) -> str | None:
        """The linear whose output need not be computed to see what the stream lacks."""
        if not self.replays or len(groups) > 1 or not can_be_silent(module, self.architecture, groups[0]):
            return None
        return groups[0].balance_layers[0]

    def observe_experts(self, groups: Sequence[int], own: Weights) -> Sequence[InputStatistics]:
        """Routers send tokens elsewhere in the copy, so experts have no pairs: moments alone."""
        architecture = self.decoder.architecture.at(self.layer)
        with (
            self.decoder.layer(self.layer, own) as module,
            collecting(module, architecture, self.ranks, self.decoder.scratch_of(self.layer)) as collectors,
        ):
            for index, batch in enumerate(self.own):
                self.call(index)(module, batch)
        if not self.ranks.is_first:
            return []
        prefix = architecture.layer_prefix(self.layer)
        names = [prefix + architecture.groups[index].balance_layers[0] for index in groups]
        return results([collectors[index] for index in groups], names)

    @torch.no_grad()
    def lesson(self, original: Weights) -> Lesson:
        """The present layer's training data: states of the copy, and outputs of the original."""
        inputs, targets, sections = list[Tensor](), list[Tensor](), self.lesson_sections()
        calls: list[LayerCall] = []
        references = self.referenced(original)
        for batch, start in sections:
            owner = self.ranks.owner(batch)
            if self.ranks.rank == owner:
                windows, number = slice(start, start + self.size), batch // self.ranks.size
                mine = self.own[number][windows].contiguous()
                target = references[number][LAYER_OUTPUT].view_as(self.own[number])[windows].contiguous()
            else:
                mine = self.own[0].new_empty(self.size, *self.own[0].shape[1:])
                target = torch.empty_like(mine)
            for value, values in ((mine, inputs), (target, targets)):
                self.ranks.bring(value, owner)
                values.append(value)
            carried = self.brought(batch, start)
            if self.ranks.is_first:
                calls.append(self.calls.of(len(self.own) + len(calls), self.layer, carried))

        def forward(weights: Mapping[str, Tensor], states: Tensor) -> Tensor:
            number = next(number for number, each in enumerate(inputs) if each is states)
            return self.forward(weights, states, calls[number])

        return Lesson(inputs, targets, held_back(len(sections)), forward)

    def brought(self, batch: int, start: int) -> LayerArguments:
        """What other layers of the copy hand to the present one for a part of the lesson, on its owner's
        rank and the first."""
        owner, carries = self.ranks.owner(batch), bool(self.calls.carried_names[self.layer])
        if not carries or self.ranks.rank not in (owner, 0):
            return {}
        mine = self.ranks.rank == owner
        windows = slice(start, start + self.size) if mine else slice(0, self.size)
        number = batch // self.ranks.size if mine else 0
        values = self.calls.carried(number, self.layer, windows, self.own[number].shape[0])

        def bring(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                leaf = leaf.clone(memory_format=torch.contiguous_format)
                self.ranks.bring(leaf, owner)
            return leaf

        return {key: rebuilt(values[key], bring, {}) for key in sorted(values)}

    def lesson_sections(self) -> list[tuple[int, int]]:
        """Batch and first window of each part of the lesson: the first windows of the text that fit.

        So many that LESSON_WINDOWS are learned from, beside those that are held back.
        """
        sections = [
            (batch, start)
            for batch, windows in enumerate(self.windows)
            for start in range(0, windows - self.size + 1, self.size)
        ]
        learned = -(-LESSON_WINDOWS // self.size)
        return sections[: learned + held_back(learned * HELD_BACK // (HELD_BACK - 1))]

    def forward(self, weights: Mapping[str, Tensor], batch: Tensor, call: LayerCall) -> Tensor:
        """The present layer's output with these weights; gradients reach them."""
        module = self.decoder.layers[self.layer]
        return call(module, batch, self.state_of(module, weights))

    def state_of(self, module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights by the module's own names, on its device and in its dtype."""
        decoder = self.decoder
        weights = decoder.with_joined(self.layer, dict(weights))
        return {
            name: weights[decoder.architecture.stored_name(name)].to(decoder.device, decoder.dtype)
            for name in module.state_dict()
        }


def held_back(count: int) -> int:
    """How many of a lesson's parts are not learned from: none if there is but one."""
    return 0 if count == 1 else max(1, count // HELD_BACK)


def stream_weights(stream: Tensor) -> Tensor:
    """(tokens,): by which squared errors of a stream (tokens, C) count: one over its size.

    Far below the usual size, at a thirtieth of it, tokens count no more.
    """
    energy = stream.square().mean(dim=1)
    return (energy + 1e-3 * energy.median()).clamp(min=1e-30).rsqrt()


class Drift:
    """Running sums of one group over the batches."""

    def __init__(self, group: ScaleGroup, scales: Tensor | None) -> None:
        self.group, self.scales = group, scales
        self.collector = InputCollector()
        self.total: Tensor | None = None

    def add(self, original: dict[str, Tensor], copy: dict[str, Tensor]) -> None:
        """Add one batch's inputs in the original and in the copy."""
        own, weights = copy[self.group.source], None
        reference = original[self.group.joins or self.group.source].float()
        if self.group.joins is not None:
            missing, weights = reference - copy[self.group.joins], stream_weights(reference)
        elif self.scales is not None:
            missing = reference / self.scales - own
        else:
            missing = reference - own
        self.collector.add(own, weights)
        if weights is not None:
            missing *= weights[:, None]
        if self.total is None:
            self.total = missing.new_zeros(missing.shape[1], own.shape[1])
        add_product(self.total, missing, own)

    def add_up(self, ranks: Ranks) -> None:
        """The sums over the batches of all ranks; the first one gets them."""
        assert self.total is not None
        self.collector.add_up(ranks)
        ranks.add_up([self.total])

    def result(self, name: str, silent: Tensor | None = None) -> InputStatistics:
        """silent: the weight of a linear that gave nothing, so that the stream lacked its output too."""
        statistics = self.collector.result(name)
        assert self.total is not None
        mean = self.total / self.collector.weight
        if silent is not None:
            mean -= silent @ statistics.moment
        if self.group.joins is not None:
            return replace(statistics, output_drift=mean)
        return replace(statistics, input_drift=mean)
