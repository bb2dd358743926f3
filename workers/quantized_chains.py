"""Calibration on a recipe's own errors: inputs that the quantized predecessors of a layer give.

GPTQ spreads a column's error over the next ones for given inputs. With the inputs of the quantized chain
it also makes up for what earlier layers lost. Such a recipe can't share its statistics: it costs several
forward passes. `awq` with plain rounding stays on the full-precision chain that all others share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from app.core.plan import CandidatePlan
from workers.layer_checkpoints import LayerCheckpoints
from workers.quantization.layer import LayerResult, OwnChain
from workers.quantization.omniquant import Lesson
from workers.quantization.paired_pass import PairedPass, PairedStatistics


class QuantizedChains:
    """One pair of passes for each recipe that asks for it, before layer 0 at first.

    `timed` gives the context in which the forward passes of a recipe are counted.
    """

    def __init__(
        self,
        candidates: Iterable[CandidatePlan],
        start: Callable[[], PairedPass],
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
                    chain.advance(original, result.weights(original))

    def view(self, candidate: CandidatePlan, original: dict[str, Tensor]) -> OwnChain | None:
        """The present layer on the candidate's own chain; None if it has none."""
        chain = self.passes.get(candidate.recipe_index)
        if chain is None:
            return None

        def observe(
            groups: Sequence[int], own: dict[str, Tensor], scales: Sequence[Tensor | None]
        ) -> list[PairedStatistics]:
            with self.timed(candidate.recipe_index):
                return chain.observe(groups, original, own, scales)

        def lesson() -> Lesson:
            with self.timed(candidate.recipe_index):
                return chain.lesson(original)

        return OwnChain(observe, lesson)

    def advance(self, candidate: CandidatePlan, original: dict[str, Tensor], result: LayerResult) -> None:
        """Pass the candidate's chain through the layer as it was quantized."""
        chain = self.passes.get(candidate.recipe_index)
        if chain is not None:
            with self.timed(candidate.recipe_index):
                chain.advance(original, result.weights(original))
