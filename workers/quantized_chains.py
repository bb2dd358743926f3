"""Calibration on a recipe's own errors: inputs that the quantized predecessors of a layer give.

GPTQ spreads a column's error over the next ones for given inputs. With the inputs of the quantized chain
it also makes up for what earlier layers lost. Such a recipe can't share its statistics, so it costs two
more forward passes; `awq`, with either rounding, stays on the full-precision chain that all others share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace

from app.core.plan import CandidatePlan
from workers.layer_checkpoints import LayerCheckpoints
from workers.layer_solver import CalibratedLayer
from workers.quantization.calibration import CalibrationPass
from workers.quantization.layer import LayerResult


class QuantizedChains:
    """One calibration pass for each recipe that asks for it, before layer 0 at first.

    `timed` gives the context in which the forward passes of a recipe are counted.
    """

    def __init__(
        self,
        candidates: Iterable[CandidatePlan],
        start: Callable[[], CalibrationPass],
        timed: Callable[[int], AbstractContextManager[None]],
    ) -> None:
        self.timed = timed
        self.passes = {
            candidate.recipe_index: start()
            for candidate in candidates
            if candidate.recipe.inputs == "quantized chain"
        }

    def catch_up(self, layer: int, checkpoints: LayerCheckpoints) -> None:
        """Bring every pass before `layer`, through the layers that are finished."""
        for recipe, chain in self.passes.items():
            with self.timed(recipe):
                while chain.layer < layer:
                    original = chain.decoder.layer_weights(chain.layer)
                    result = checkpoints.load_layer(recipe, chain.layer)
                    chain.pass_through(result.weights(original))

    def calibrated(self, candidate: CandidatePlan, shared: CalibratedLayer) -> CalibratedLayer:
        """The layer with the statistics of the candidate's own chain, or as it is."""
        chain = self.passes.get(candidate.recipe_index)
        if chain is None:
            return shared
        with self.timed(candidate.recipe_index):
            groups = chain.observe(shared.weights)
        return replace(shared, statistics=replace(shared.statistics, groups=groups))

    def advance(self, candidate: CandidatePlan, layer: CalibratedLayer, result: LayerResult) -> None:
        """Pass the candidate's chain through the layer as it was quantized."""
        chain = self.passes.get(candidate.recipe_index)
        if chain is not None:
            with self.timed(candidate.recipe_index):
                chain.pass_through(result.weights(layer.weights))
