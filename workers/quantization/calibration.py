"""The calibration pass: hidden states of the calibration text, one decoder layer after the other.

On the full-precision chain every layer sees the inputs of the original model, so statistics do not depend
on any recipe: one pass serves them all. On a quantized chain a pass belongs to one recipe: each layer is
observed with the inputs that its quantized predecessors give, so that GPTQ makes up for their errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from app.core.planning.architectures import LAYER_OUTPUT
from app.core.planning.cached_attention import attention_module
from workers.modeling.cache_rounding import tapped
from workers.modeling.decoder import Decoder
from workers.modeling.layer_calls import LayerArguments, LayerCall
from workers.modeling.layer_weights import Weights
from workers.quantization.cache_range import CacheRange, RangeCollector
from workers.quantization.input_statistics import InputStatistics, LayerStatistics, collecting, results
from workers.quantization.observation import References, reference_names, watching_names
from workers.quantization.reduction import ALONE, Ranks

STATES_SHARE = 0.1  # of a GPU's free memory
EQUIVALENCE_LIMIT = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class CalibrationPass:
    """Hidden states of all calibration batches before `layer`.

    On a GPU they wait in pinned host memory where they would take too much of the device's. Of several
    ranks each holds its share of `batches`, and the first one gets the statistics of all. With `sees_caches`
    they hold the range of what layers cache.
    """

    sees_caches = False

    def __init__(self, decoder: Decoder, batches: list[Tensor], ranks: Ranks = ALONE) -> None:
        self.decoder, self.ranks = decoder, ranks
        batches = ranks.share(batches)
        self.layer = 0
        self.refers, self.references = False, References()  # of the last layer, for quantized copies
        self.cache_range: CacheRange | None = None  # of the last layer
        self.on_host = exceeds_device(decoder, sum(batch.numel() for batch in batches))
        with torch.no_grad():
            # One window by itself, so that self-checks need not run a whole batch.
            self.states, self.calls = decoder.start(batches, self.stowed, [batches[0][:1]])
        self.calls.on_host = self.on_host

    def stowed(self, states: Tensor) -> Tensor:
        """One batch's states, moved to where they wait."""
        if not self.on_host:
            return states
        host = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
        return host.copy_(states, non_blocking=True)

    @property
    def can_restore(self) -> bool:
        """Whether hidden states are all that a layer gets from those before it."""
        return not self.calls.carries

    def restore(self, layer: int, states: list[Tensor]) -> None:
        """Go on before `layer` with the hidden states saved there, if the pass `can_restore`."""
        self.layer = layer
        self.states = [self.stowed(batch.to(self.decoder.device)) for batch in self.ranks.share(states)]

    def skip(self) -> None:
        """Advance by one layer of the original model without collecting."""
        self.pass_through(self.decoder.layer_weights(self.layer))

    @torch.no_grad()
    def pass_through(self, weights: Weights) -> None:
        """Advance by one layer that has these weights."""
        with self.decoder.layer(self.layer, weights) as module:
            for index, batch in enumerate(self.states):
                states = batch.to(self.decoder.device, non_blocking=True)
                self.states[index] = self.stowed(self.call(index)(module, states))
        self.layer += 1

    def collect(self, weights: Weights, *, moments: bool = True) -> LayerStatistics:
        """Advance by one layer, with its statistics; only the first rank gets those of groups.

        Without `moments`, which nobody reads then, there are none of groups; a layer with experts has them
        always, for its counts.
        """
        device = self.decoder.device
        before = self.states[0][:1].to(device, copy=True)
        moments = moments or self.decoder.architecture.at(self.layer).experts is not None
        groups = self.observe(weights, advance=True, moments=moments)
        self.layer += 1
        return LayerStatistics(groups, (before, self.states[0][:1].to(device)), self.cache_range)

    @torch.no_grad()
    def observe(
        self, weights: Weights, *, advance: bool = False, moments: bool = True
    ) -> Sequence[InputStatistics]:
        """The statistics of the layer with these weights; its outputs become the states if asked."""
        architecture = self.decoder.architecture.at(self.layer)
        names = reference_names(architecture) if self.refers and advance else {LAYER_OUTPUT}
        self.references = []
        with (
            self.decoder.layer(self.layer, weights) as module,
            watching_names(module, architecture, names) as seen,
            ExitStack() as stack,
        ):
            scratch = self.decoder.scratch_of(self.layer)
            ranges = self.ranges(module)
            stack.enter_context(tapped(module, ranges))
            collectors = (
                stack.enter_context(collecting(module, architecture, self.ranks, scratch)) if moments else []
            )
            for index, batch in enumerate(self.states):
                states = batch.to(self.decoder.device, non_blocking=True)
                values = seen.reference(module, states, self.call(index))
                if advance:
                    self.states[index] = self.stowed(values[LAYER_OUTPUT].view_as(states))
                if self.refers:
                    self.references.append(values)
        prefix = self.decoder.architecture.layer_prefix(self.layer)
        seen_ranges = [each.result(prefix[:-1], self.ranks) for each in ranges.values()]
        self.cache_range = next(iter(seen_ranges), None)
        if not self.ranks.is_first or not moments:
            return []
        return results(collectors, [prefix + group.balance_layers[0] for group in architecture.groups])

    def ranges(self, layer: nn.Module) -> dict[str, RangeCollector]:
        """By module of the present layer: what collects the range of what it caches."""
        name = attention_module(self.decoder.architecture, self.layer) if self.sees_caches else None
        return {} if name is None else {name: RangeCollector(layer.get_submodule(name))}

    def call(self, index: int) -> LayerCall:
        """The present layer on a batch."""
        return self.calls.of(index, self.layer)

    def probe_call(self, layer: int) -> LayerCall:
        """A layer on the first window of the first batch.

        A pass that did not come to the layer, as it serves such checks alone, is brought there if earlier
        layers hand anything on.
        """
        carried: LayerArguments = {}
        if self.calls.carries:
            while self.layer < layer:
                self.skip()
            carried = self.calls.carried(0, layer, slice(0, 1), self.states[0].shape[0])
        return self.calls.of(len(self.states), layer, carried)


def exceeds_device(decoder: Decoder, num_tokens: int) -> bool:
    """Whether the hidden states of `num_tokens` would take too large a share of the GPU's free memory."""
    if decoder.device.type != "cuda":
        return False
    size = num_tokens * decoder.model.config.get_text_config().hidden_size * decoder.dtype.itemsize
    return bool(size > STATES_SHARE * torch.cuda.mem_get_info(decoder.device)[0])


@torch.no_grad()
def equivalence_error(
    run: CalibrationPass, layer: int, folded: Weights, probe: tuple[Tensor, Tensor]
) -> float:
    """Relative error of a layer's output when it has the folded, unrounded weights.

    probe: one window's (1, tokens, hidden) input and output of the original layer. In half precision a
    router's near ties fall to other experts for some tokens, which says nothing about the fold: of layers
    with experts the quarter of the tokens that differ most is left out.
    """
    (inputs, expected), call = probe, run.probe_call(layer)
    with run.decoder.layer(layer, folded) as module:
        output = call(module, inputs)
    errors = (output - expected).float().norm(dim=-1).flatten()
    changes = (expected - inputs).float().norm(dim=-1).flatten()  # without the residual
    if run.decoder.architecture.at(layer).experts is not None and run.decoder.dtype != torch.float32:
        alike = errors.argsort()[: -(-3 * len(errors) // 4)]
        errors, changes = errors[alike], changes[alike]
    return float(errors.norm() / changes.norm().clamp(min=1e-30))
