"""The output folders of a job's candidates, filled layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from app.core.child.assignment import OUTPUT, Assignment
from app.core.planning.plan import CandidatePlan, Plan
from workers.formats.folder import FormatFolder
from workers.modeling.checkpoint import Checkpoint
from workers.quantization.layer import LayerResult


class Outputs:
    """One folder for each candidate and format."""

    def __init__(
        self, assignment: Assignment, checkpoint: Checkpoint, plan: Plan, device: torch.device
    ) -> None:
        self.assignment, self.checkpoint, self.plan, self.device = assignment, checkpoint, plan, device
        self.by_recipe: dict[int, list[FormatFolder]] = {}

    def of(self, candidate: CandidatePlan) -> list[FormatFolder]:
        """Where the candidate goes in every format."""
        index, parent = candidate.recipe_index, self.assignment.work_folder / OUTPUT
        if index not in self.by_recipe:
            self.by_recipe[index] = [
                FormatFolder(parent / f"{index}-{name}", name, self.checkpoint, self.plan, candidate)
                for name in self.assignment.spec.formats
            ]
            for folder in self.by_recipe[index]:
                folder.device = self.device
        return self.by_recipe[index]

    def add_layer(
        self,
        candidate: CandidatePlan,
        layer: int,
        result: LayerResult,
        load_layer: Callable[[int], LayerResult],
    ) -> None:
        """Pack a layer that was solved just now; `load_layer` gives those of an earlier attempt."""
        for folder in self.of(candidate):
            folder.add_layer(
                layer,
                lambda number: result if number == layer else load_layer(number),
                self.assignment.shard_bytes,
            )
