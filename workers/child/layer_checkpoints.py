"""Finished layers on disk, so that a job that died goes on where it stopped.

Every file carries the identity of the work it belongs to; one of other work is refused, never used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from app.core.child.assignment import Checkpointed
from app.core.formats.file_format import Scheme
from app.core.jobs.report import LayerReport
from workers.child.stamped_files import is_stamped, read_stamped, write_stamped
from workers.modeling.quantized_weight import QuantizedWeight
from workers.quantization.layer import LayerResult

Announce = Callable[[Checkpointed], None]


class LayerCheckpoints:
    """The checkpoint folder of one job."""

    def __init__(self, folder: Path, identity: str, announce: Announce) -> None:
        self.folder, self.identity, self.announce = folder, identity, announce
        folder.mkdir(parents=True, exist_ok=True)
        self.states_file: str | None = None

    def layer_key(self, recipe: int, layer: int) -> str:
        return f"layer-{layer:05d}-recipe-{recipe:02d}.safetensors"

    def is_done(self, layer: int, num_recipes: int) -> bool:
        """True if the layer is finished for every recipe."""
        return all(self.is_ours(self.layer_key(recipe, layer)) for recipe in range(num_recipes))

    def is_ours(self, key: str) -> bool:
        """True if the file exists, is whole and belongs to this work."""
        return is_stamped(self.folder / key, self.identity)

    def save(
        self, key: str, tensors: dict[str, Tensor], extra: str = "", replaces: str | None = None
    ) -> None:
        write_stamped(self.folder / key, tensors, self.identity, extra)
        self.announce(Checkpointed(key=key, replaces=replaces))
        if replaces is not None:
            (self.folder / replaces).unlink(missing_ok=True)

    def save_layer(self, recipe: int, result: LayerResult, report: LayerReport) -> None:
        tensors: dict[str, Tensor] = {f"dense.{name}": value for name, value in result.dense.items()}
        schemes = {}
        for name, weight in result.quantized.items():
            tensors |= {f"q.{name}": weight.q, f"scale.{name}": weight.scale, f"zero.{name}": weight.zero}
            schemes[name] = weight.scheme.model_dump()
        extra = json.dumps({"schemes": schemes, "report": report.model_dump()})
        self.save(self.layer_key(recipe, report.layer), tensors, extra)

    def load_layer(self, recipe: int, layer: int) -> LayerResult:
        tensors, extra = read_stamped(self.folder / self.layer_key(recipe, layer))
        quantized = {
            name: QuantizedWeight(
                tensors[f"q.{name}"], tensors[f"scale.{name}"], tensors[f"zero.{name}"], Scheme(**scheme)
            )
            for name, scheme in json.loads(extra)["schemes"].items()
        }
        dense = {name[6:]: value for name, value in tensors.items() if name.startswith("dense.")}
        return LayerResult(quantized, dense, [])

    def layer_report(self, recipe: int, layer: int) -> LayerReport:
        with safe_open(self.folder / self.layer_key(recipe, layer), "pt") as file:
            return LayerReport(**json.loads(file.metadata()["extra"])["report"])

    def save_states(self, layer: int, states: list[Tensor]) -> None:
        """The inputs of `layer`, one tensor a batch; older ones are dropped."""
        key = f"states-{layer:05d}.safetensors"
        self.save(key, {f"{i:06d}": batch for i, batch in enumerate(states)}, replaces=self.states_file)
        self.states_file = key

    def latest_states(self, up_to: int) -> tuple[int, list[Tensor]] | None:
        """The inputs of the last layer at or before `up_to` that were saved."""
        for layer in range(up_to, 0, -1):
            key = f"states-{layer:05d}.safetensors"
            if self.is_ours(key):
                self.states_file = key
                tensors, _ = read_stamped(self.folder / key)
                return layer, [tensors[name] for name in sorted(tensors)]
        return None


def resume_layer(checkpoints: LayerCheckpoints, num_layers: int, num_recipes: int) -> int:
    """The first layer that is not finished."""
    for layer in range(num_layers):
        if not checkpoints.is_done(layer, num_recipes):
            return layer
    return num_layers
