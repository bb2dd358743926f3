"""Finished layers and statistics on disk: a job that died goes on, and a further recipe needs no new pass.

Every file carries the identity of the work that it belongs to. It is complete when it has its name: it is
written aside and renamed. One of other work, or one that was cut short, is never read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from app.core.child.assignment import Checkpointed
from app.core.formats.file_format import Scheme
from app.core.jobs.report import LayerReport
from app.core.system_faults import system_number
from workers.modeling.quantized_weight import QuantizedWeight
from workers.quantization.input_statistics import InputStatistics, LayerStatistics
from workers.quantization.layer import LayerResult

Announce = Callable[[Checkpointed], None]


class StampedFolder:
    """A folder of safetensors files that belong to the work `identity`."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        folder.mkdir(parents=True, exist_ok=True)

    def holds(self, key: str) -> bool:
        """Whether the file exists, is complete and belongs to this work."""
        path = self.folder / key
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                return bool((file.metadata() or {}).get("identity") == self.identity)
        except SafetensorError as fault:
            if system_number(fault) is not None:  # the file may be whole
                raise
            return False

    def write(self, key: str, tensors: dict[str, Tensor], extra: str = "") -> None:
        path = self.folder / key
        aside = path.with_suffix(".partial")
        contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(contiguous, aside, metadata={"identity": self.identity, "extra": extra})
        os.replace(aside, path)

    def read(self, key: str) -> tuple[dict[str, Tensor], str]:
        """The tensors and the `extra` text that were written."""
        with safe_open(self.folder / key, "pt") as file:
            # Cloned: a tensor that maps the file would keep its pages resident.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # not a dict
            return tensors, file.metadata()["extra"]

    def read_extra(self, key: str) -> str:
        """The text alone."""
        with safe_open(self.folder / key, "pt") as file:
            return str(file.metadata()["extra"])


class LayerCheckpoints(StampedFolder):
    """The checkpoint folder of one job: solved layers of each recipe, and hidden states between layers."""

    def __init__(self, folder: Path, identity: str, announce: Announce) -> None:
        super().__init__(folder, identity)
        self.announce = announce
        self.states_key: str | None = None

    def layer_key(self, recipe: int, layer: int) -> str:
        return f"layer-{layer:05d}-recipe-{recipe:02d}.safetensors"

    def states_key_of(self, layer: int) -> str:
        return f"states-{layer:05d}.safetensors"

    def is_done(self, layer: int, num_recipes: int) -> bool:
        """Whether the layer is finished for every recipe."""
        return all(self.holds(self.layer_key(recipe, layer)) for recipe in range(num_recipes))

    def save_layer(self, recipe: int, result: LayerResult, report: LayerReport) -> None:
        tensors: dict[str, Tensor] = {f"dense.{name}": value for name, value in result.dense.items()}
        schemes = {}
        for name, weight in result.quantized.items():
            tensors |= {f"q.{name}": weight.q, f"scale.{name}": weight.scale, f"zero.{name}": weight.zero}
            schemes[name] = weight.scheme.model_dump()
        key = self.layer_key(recipe, report.layer)
        self.write(key, tensors, json.dumps({"schemes": schemes, "report": report.model_dump()}))
        self.announce(Checkpointed(key=key))

    def load_layer(self, recipe: int, layer: int) -> LayerResult:
        tensors, extra = self.read(self.layer_key(recipe, layer))
        quantized = {
            name: QuantizedWeight(
                tensors[f"q.{name}"], tensors[f"scale.{name}"], tensors[f"zero.{name}"], Scheme(**scheme)
            )
            for name, scheme in json.loads(extra)["schemes"].items()
        }
        dense = {name[6:]: value for name, value in tensors.items() if name.startswith("dense.")}
        return LayerResult(quantized, dense, [])

    def layer_report(self, recipe: int, layer: int) -> LayerReport:
        return LayerReport(**json.loads(self.read_extra(self.layer_key(recipe, layer)))["report"])

    def save_states(self, layer: int, states: list[Tensor]) -> None:
        """The inputs of `layer`, one tensor a batch; older ones are dropped."""
        key, older = self.states_key_of(layer), self.states_key
        self.write(key, {f"{index:06d}": batch for index, batch in enumerate(states)})
        self.announce(Checkpointed(key=key, replaces=older))
        if older is not None:
            (self.folder / older).unlink(missing_ok=True)
        self.states_key = key

    def latest_states(self, up_to: int) -> tuple[int, list[Tensor]] | None:
        """The inputs of the last layer at or before `up_to` that were saved."""
        for layer in range(up_to, 0, -1):
            key = self.states_key_of(layer)
            if self.holds(key):
                self.states_key = key
                tensors, _ = self.read(key)
                return layer, [tensors[name] for name in sorted(tensors)]
        return None


def resume_layer(checkpoints: LayerCheckpoints, num_layers: int, num_recipes: int) -> int:
    """The first layer that is not finished."""
    for layer in range(num_layers):
        if not checkpoints.is_done(layer, num_recipes):
            return layer
    return num_layers


class StatisticsStore(StampedFolder):
    """The statistics of every layer; they depend on no recipe."""

    def layer_key(self, layer: int) -> str:
        return f"layer-{layer:05d}.safetensors"

    def missing(self, num_layers: int) -> list[int]:
        """The layers without usable statistics."""
        return [layer for layer in range(num_layers) if not self.holds(self.layer_key(layer))]

    def save(self, layer: int, statistics: LayerStatistics) -> None:
        tensors = {"probe.input": statistics.probe[0], "probe.output": statistics.probe[1]}
        for index, group in enumerate(statistics.groups):
            tensors |= {f"{index:04d}.abs_mean": group.abs_mean, f"{index:04d}.moment": group.moment}
        counts = [(group.num_tokens, group.routed_tokens, group.all_shown) for group in statistics.groups]
        self.write(self.layer_key(layer), tensors, json.dumps(counts))

    def load(self, layer: int) -> LayerStatistics:
        tensors, extra = self.read(self.layer_key(layer))
        groups = [
            InputStatistics(tensors[f"{index:04d}.abs_mean"], tensors[f"{index:04d}.moment"], *counts)
            for index, counts in enumerate(json.loads(extra))
        ]
        return LayerStatistics(groups, (tensors["probe.input"], tensors["probe.output"]))
