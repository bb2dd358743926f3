"""Statistics of every layer on disk: a further recipe then costs a search, and no calibration pass."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workers.child.stamped_files import is_stamped, read_stamped, write_stamped
from workers.quantization.input_statistics import InputStatistics

STATISTICS = "statistics"


@dataclass(frozen=True)
class LayerStatistics:
    """What a calibration pass leaves behind of a layer: per group, and one window for self-checks."""

    groups: list[InputStatistics]
    probe: tuple[Tensor, Tensor]  # the layer's input and output, (1, tokens, hidden)

    def to(self, device: torch.device) -> LayerStatistics:
        groups = [group.to(device) for group in self.groups]
        return LayerStatistics(groups, (self.probe[0].to(device), self.probe[1].to(device)))


class StatisticsStore:
    """One file a layer; `identity` names model, calibration tokens and device kind, and no recipe."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def missing(self, num_layers: int) -> list[int]:
        """The layers without usable statistics."""
        return [layer for layer in range(num_layers) if not is_stamped(self.path(layer), self.identity)]

    def save(self, layer: int, statistics: LayerStatistics) -> None:
        tensors = {"probe.input": statistics.probe[0], "probe.output": statistics.probe[1]}
        for index, group in enumerate(statistics.groups):
            tensors[f"{index:04d}.abs_mean"] = group.abs_mean
            tensors[f"{index:04d}.second_moment"] = group.second_moment
        counts = [(group.num_tokens, group.routed_tokens) for group in statistics.groups]
        write_stamped(self.path(layer), tensors, self.identity, json.dumps(counts))

    def load(self, layer: int) -> LayerStatistics:
        tensors, extra = read_stamped(self.path(layer))
        groups = [
            InputStatistics(tensors[f"{index:04d}.abs_mean"], tensors[f"{index:04d}.second_moment"], *counts)
            for index, counts in enumerate(json.loads(extra))
        ]
        return LayerStatistics(groups, (tensors["probe.input"], tensors["probe.output"]))
