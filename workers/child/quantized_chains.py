"""Calibration on a recipe's own errors: a layer's inputs come from its quantized predecessors.

GPTQ spreads a column's error over the next ones for given inputs. With the inputs of the quantized chain
it also makes up for what earlier layers lost. Such a recipe can't share its statistics: it costs several
forward passes. `awq` with plain rounding stays on the full-precision chain that all others share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from app.core.planning.plan import CandidatePlan
from app.core.records.job import Stage
from workers.child.layer_files import LayerCheckpoints
from workers.child.stage_clock import StageClock
from workers.modeling.decoder import Decoder
from workers.modeling.layer_weights import Weights, shape_of
from workers.quantization.calibration import CalibrationPass
from workers.quantization.input_statistics import InputStatistics
from workers.quantization.layer import LayerResult, OwnChain
from workers.quantization.omniquant import Lesson
from workers.quantization.paired_pass import PairedPass
from workers.quantization.reduction import Ranks


class QuantizedChains:
    """One pair of passes for each recipe that asks for it, before layer 0 at first.

    The forward passes of a recipe are counted as calibrating, whatever stage they run in.
    """

    def __init__(
        self,
        candidates: Iterable[CandidatePlan],
        decoder: Decoder,
        batches: list[Tensor],
        ranks: Ranks,
        clock: StageClock,
    ) -> None:
        self.clock = clock
        self.passes = {
            candidate.recipe_index: PairedPass(decoder, batches, ranks)
            for candidate in candidates
            if candidate.recipe.has_own_chain
        }

    def read_from(self, run: CalibrationPass) -> None:
        """Take what the original gives from a pass that collects each layer before a recipe comes to it."""
        for chain in self.passes.values():
            chain.read_from(run)

    def timed(self, recipe: int) -> AbstractContextManager[None]:
        return self.clock.counted(Stage.CALIBRATING, recipe)

    def catch_up(self, layer: int, checkpoints: LayerCheckpoints) -> None:
        """Bring every pass before `layer`, through the layers that are finished."""
        for recipe, chain in self.passes.items():
            with self.timed(recipe):
                while chain.layer < layer:
                    original = chain.decoder.layer_weights(chain.layer)
                    result = checkpoints.load_layer(recipe, chain.layer)
                    chain.advance(original, result.weights(original))

    def view(self, candidate: CandidatePlan, original: Weights) -> OwnChain | None:
        """The present layer on the candidate's own chain; None if it has none."""
        chain = self.passes.get(candidate.recipe_index)
        if chain is None:
            return None

        def observe(
            groups: Sequence[int], own: Weights, scales: Sequence[Tensor | None]
        ) -> Sequence[InputStatistics]:
            with self.timed(candidate.recipe_index):
                hand_out_weights(chain, own)
                hand_out_scales(chain, groups, original, scales)
                return chain.observe(groups, original, own, scales)

        def lesson() -> Lesson:
            with self.timed(candidate.recipe_index):
                return chain.lesson(original)

        return OwnChain(observe, None if chain.at_head else lesson)

    def advance(self, candidate: CandidatePlan, original: Weights, result: LayerResult) -> None:
        """Pass the candidate's chain through the layer as it was quantized."""
        chain = self.passes.get(candidate.recipe_index)
        if chain is not None:
            with self.timed(candidate.recipe_index):
                own = result.weights(original)
                hand_out_weights(chain, own)
                chain.advance(original, own)

    def follow(self, candidate: CandidatePlan, original: Weights) -> None:
        """Run a further rank's share of the passes while the first rank solves a layer."""
        chain = self.passes[candidate.recipe_index]
        architecture = chain.decoder.architecture.at(chain.layer)
        for stage in architecture.stages:
            own = hand_out_weights(chain, original)
            chain.observe(stage, original, own, hand_out_scales(chain, stage, original))
        if candidate.recipe.method == "omniquant" and not chain.at_head:
            chain.lesson(original)
        chain.advance(original, hand_out_weights(chain, original))


def hand_out_weights(chain: PairedPass, weights: Weights) -> Weights:
    """A layer's weights of the first rank, as every rank computes with them; others name their shapes."""
    if chain.ranks.size == 1:
        return weights
    decoder = chain.decoder
    shared = {
        name: weights[name].to(decoder.device, decoder.dtype, copy=True).contiguous()
        for name in sorted(weights)
    }
    chain.ranks.hand_out(list(shared.values()))
    return shared


def hand_out_scales(
    chain: PairedPass,
    groups: Sequence[int],
    original: Weights,
    scales: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """The scales that divide the groups' inputs in the first rank's copy of the layer; ones by default."""
    if chain.ranks.size == 1:
        return list(scales or ())
    architecture = chain.decoder.architecture.at(chain.layer)
    shared = []
    for position, index in enumerate(groups):
        channels = shape_of(original, architecture.groups[index].balance_layers[0] + ".weight")[1]
        ones = torch.ones(channels, device=chain.decoder.device)
        factor = None if scales is None else scales[position]
        shared.append(ones if factor is None else factor.to(ones).contiguous())
    chain.ranks.hand_out(shared)
    return list(shared)
