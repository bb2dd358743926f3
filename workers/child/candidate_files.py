"""Where the layers of one candidate go: checkpoints while they are solved, then a folder for each format."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

from app.core.child.assignment import OUTPUT
from app.core.jobs.report import LayerReport
from app.core.planning.plan import CandidatePlan
from workers.child.layer_files import LayerCheckpoints
from workers.child.work import Work
from workers.formats.folder import FormatFolder
from workers.formats.folders import folder_class
from workers.modeling.quantized_weight import QuantizedWeight
from workers.quantization.layer import LayerResult


@dataclass(frozen=True)
class CandidateFiles:
    """The files of one candidate."""

    work: Work
    candidate: CandidatePlan
    checkpoints: LayerCheckpoints
    folders: tuple[FormatFolder, ...]  # one for each format of the job

    @classmethod
    def of(cls, work: Work, candidate: CandidatePlan, checkpoints: LayerCheckpoints) -> CandidateFiles:
        parent = work.assignment.work_folder / OUTPUT
        folders = tuple(
            folder_class(name)(
                parent / f"{candidate.recipe_index}-{name}", name, work.checkpoint, work.plan, candidate
            )
            for name in work.spec.formats
        )
        for folder in folders:
            folder.device, folder.by_expert = work.device, work.by_expert
        return cls(work, candidate, checkpoints, folders)

    def is_done(self, layer: int) -> bool:
        return self.checkpoints.holds(self.checkpoints.layer_key(self.candidate.recipe_index, layer))

    def new_linears(self, layer: int) -> MutableMapping[str, QuantizedWeight]:
        """Where a layer's linears go as they are finished: in files if it is done by expert."""
        if layer not in self.work.by_expert:
            return {}
        return self.checkpoints.new_linears(self.candidate.recipe_index, layer, self.work.device)

    def load_layer(self, layer: int) -> LayerResult:
        """A solved layer, on the device."""
        return self.checkpoints.load_layer(self.candidate.recipe_index, layer).to(self.work.device)

    def layer_reports(self) -> list[LayerReport]:
        layers = range(self.work.plan.steps)
        return [self.checkpoints.layer_report(self.candidate.recipe_index, layer) for layer in layers]

    def keep_layer(self, result: LayerResult, report: LayerReport) -> None:
        """Write a layer's checkpoint; on a GPU its packed tensors too, while the integers lie there."""
        self.checkpoints.save_layer(self.candidate.recipe_index, result, report)
        if self.work.device.type == "cuda":
            for folder in self.folders:
                folder.add_layer(
                    report.layer,
                    lambda number: result if number == report.layer else self.load_layer(number),
                    self.work.assignment.shard_bytes,
                )
