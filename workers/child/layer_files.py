"""Finished layers and statistics on disk: a job that died goes on, and a further recipe needs no new pass.

Every file carries the identity of the work that it belongs to. It is complete when it has its name: it is
written aside and renamed. One of other work, or one that was cut short, is never read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from app.core.child.assignment import Checkpointed, LayerErrors
from app.core.faults.system_faults import system_number
from app.core.formats.file_format import Scheme
from app.core.jobs.report import LayerReport
from workers.modeling.quantized_weight import TENSORS, QuantizedWeight
from workers.quantization.cache_range import CacheRange
from workers.quantization.input_statistics import GroupStatistics, InputStatistics, LayerStatistics
from workers.quantization.layer import LayerResult

Announce = Callable[[Checkpointed], None]
Counts = tuple[int, int | None, bool]  # of statistics: tokens, those routed, whether all were shown
PART_BYTES = 1 << 26  # that wait in memory until they become a file


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


class SplitFile:
    """Entries of tensors in several files beside that of `key`: written some at a time, read one by one."""

    def __init__(self, folder: StampedFolder, key: str, files: Mapping[str, str] | None = None) -> None:
        self.folder, self.stem = folder, key.removesuffix(".safetensors")
        self.files = dict(files or {})  # by entry
        self.waiting: dict[str, dict[str, Tensor]] = {}

    def put(self, entry: str, tensors: Mapping[str, Tensor]) -> None:
        self.waiting[entry] = {field: value.cpu() for field, value in tensors.items()}
        if sum(value.nbytes for each in self.waiting.values() for value in each.values()) >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self.waiting:
            key = f"{self.stem}-{len(set(self.files.values())):04d}.safetensors"
            self.folder.write(
                key,
                {
                    f"{field}.{entry}": value
                    for entry, tensors in self.waiting.items()
                    for field, value in tensors.items()
                },
            )
            self.files |= dict.fromkeys(self.waiting, key)
            self.waiting = {}

    def read(self, entry: str) -> dict[str, Tensor]:
        if entry in self.waiting:
            return self.waiting[entry]
        with safe_open(self.folder.folder / self.files[entry], "pt") as file:
            names = {name: name.partition(".") for name in file.keys()}  # noqa: SIM118  # not a dict
            return {
                field: file.get_tensor(name).clone()
                for name, (field, _, own) in names.items()
                if own == entry
            }


class StoredLinears(MutableMapping[str, QuantizedWeight]):
    """The quantized linears of a layer by expert: in files as soon as they are finished, read at look-up."""

    def __init__(self, file: SplitFile, schemes: Mapping[str, Scheme], device: torch.device) -> None:
        self.file, self.schemes, self.device = file, dict(schemes), device

    def __getitem__(self, name: str) -> QuantizedWeight:
        return QuantizedWeight(scheme=self.schemes[name], **self.file.read(name)).to(self.device)

    def __setitem__(self, name: str, weight: QuantizedWeight) -> None:
        self.file.put(name, weight.tensors)
        self.schemes[name] = weight.scheme

    def __delitem__(self, name: str) -> None:
        raise NotImplementedError("what is finished stays")

    def __contains__(self, name: object) -> bool:
        return name in self.schemes

    def __iter__(self) -> Iterator[str]:
        return iter(self.schemes)

    def __len__(self) -> int:
        return len(self.schemes)


class LayerCheckpoints(StampedFolder):
    """The checkpoint folder of one job: solved layers of each recipe, and hidden states between layers.

    Linears of a layer by expert lie in files of their own; the layer's file names them, and is written last.
    """

    def __init__(self, folder: Path, identity: str, announce: Announce) -> None:
        super().__init__(folder, identity)
        self.announce = announce
        self.states_key: str | None = None

    def layer_key(self, recipe: int, layer: int) -> str:
        return f"layer-{layer:05d}-recipe-{recipe:02d}.safetensors"

    def states_key_of(self, layer: int) -> str:
        return f"states-{layer:05d}.safetensors"

    def holds(self, key: str) -> bool:
        return super().holds(key) and all(
            super(LayerCheckpoints, self).holds(each) for each in self.beside(key)
        )

    def beside(self, key: str) -> list[str]:
        """The further files of a layer."""
        extra = self.read_extra(key)
        return sorted(set(json.loads(extra).get("files", {}).values())) if extra else []

    def new_linears(self, recipe: int, layer: int, device: torch.device) -> StoredLinears:
        """Where the linears of a layer by expert go while they are quantized."""
        return StoredLinears(SplitFile(self, self.layer_key(recipe, layer)), {}, device)

    def is_done(self, layer: int, num_recipes: int) -> bool:
        """Whether the layer is finished for every recipe."""
        return all(self.holds(self.layer_key(recipe, layer)) for recipe in range(num_recipes))

    def save_layer(self, recipe: int, result: LayerResult, report: LayerReport) -> None:
        tensors: dict[str, Tensor] = {f"dense.{name}": value for name, value in result.dense.items()}
        extra: dict[str, Any] = {"report": report.model_dump()}
        if isinstance(result.quantized, StoredLinears):
            schemes, extra["files"] = result.quantized.schemes, result.quantized.file.files
        else:
            schemes = {name: weight.scheme for name, weight in result.quantized.items()}
            for name, weight in result.quantized.items():
                tensors |= {f"{field}.{name}": tensor for field, tensor in weight.tensors.items()}
        extra["schemes"] = {name: scheme.model_dump() for name, scheme in schemes.items()}
        key = self.layer_key(recipe, report.layer)
        self.write(key, tensors, json.dumps(extra))
        for each in self.beside(key):
            self.announce(Checkpointed(key=each))
        self.announce(Checkpointed(key=key, layer=errors_of(recipe, report)))

    def load_layer(self, recipe: int, layer: int) -> LayerResult:
        key = self.layer_key(recipe, layer)
        tensors, text = self.read(key)
        extra = json.loads(text)
        schemes = {name: Scheme(**scheme) for name, scheme in extra["schemes"].items()}
        quantized: Mapping[str, QuantizedWeight] = {
            name: QuantizedWeight(
                scheme=scheme,
                **{field: tensors[f"{field}.{name}"] for field in TENSORS if f"{field}.{name}" in tensors},
            )
            for name, scheme in schemes.items()
            if "files" not in extra
        }
        if "files" in extra:
            quantized = StoredLinears(SplitFile(self, key, extra["files"]), schemes, torch.device("cpu"))
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


def errors_of(recipe: int, report: LayerReport) -> LayerErrors:
    """What a reader of the running job sees of a solved layer."""
    pairs = [(each.loss, each.energy) for each in report.linears if each.energy]
    rounding = [(each.loss_rounding, each.energy) for each in report.linears if each.energy]
    return LayerErrors(
        recipe_index=recipe, layer=report.layer, error=relative(pairs), error_of_rounding=relative(rounding)
    )


def relative(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    """The sum of loss / energy; None without a linear that has both."""
    shares = [loss / energy for loss, energy in pairs if loss is not None and energy]
    return sum(shares) if shares else None


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
        """Those of a layer by expert lie in further files, which the layer's own names."""
        key = self.layer_key(layer)
        tensors = {"probe.input": statistics.probe[0], "probe.output": statistics.probe[1]}
        if statistics.cache is not None:
            tensors |= {"cache.key": statistics.cache.key, "cache.value": statistics.cache.value}
        apart = isinstance(statistics.groups, GroupStatistics)
        beside, counts = SplitFile(self, key), list[Counts]()
        for index, group in enumerate(statistics.groups):
            own = {"abs_mean": group.abs_mean, "moment": group.moment}
            if group.abs_max is not None:
                own["abs_max"] = group.abs_max
            if apart:
                beside.put(f"{index:04d}", own)
            else:
                tensors |= {f"{index:04d}.{field}": value for field, value in own.items()}
            counts.append((group.num_tokens, group.routed_tokens, group.all_shown))
        beside.flush()
        self.write(key, tensors, json.dumps({"counts": counts, "files": beside.files}))

    def holds(self, key: str) -> bool:
        if not super().holds(key):
            return False
        files = set(json.loads(self.read_extra(key))["files"].values())
        return all(super(StatisticsStore, self).holds(each) for each in files)

    def load(self, layer: int) -> LayerStatistics:
        key = self.layer_key(layer)
        tensors, text = self.read(key)
        extra = json.loads(text)
        beside = SplitFile(self, key, extra["files"])
        makers = [partial(read_group, beside, index, counts) for index, counts in enumerate(extra["counts"])]
        groups: Sequence[InputStatistics] = GroupStatistics(makers)
        if not beside.files:
            groups = [
                statistics_of(entry_of(tensors, f"{index:04d}"), counts)
                for index, counts in enumerate(extra["counts"])
            ]
        cache = CacheRange(tensors["cache.key"], tensors["cache.value"]) if "cache.key" in tensors else None
        return LayerStatistics(groups, (tensors["probe.input"], tensors["probe.output"]), cache)


def entry_of(tensors: Mapping[str, Tensor], entry: str) -> dict[str, Tensor]:
    """The tensors of one entry, by field."""
    return {
        name.removeprefix(f"{entry}."): value
        for name, value in tensors.items()
        if name.startswith(f"{entry}.")
    }


def statistics_of(tensors: Mapping[str, Tensor], counts: Counts) -> InputStatistics:
    return InputStatistics(tensors["abs_mean"], tensors["moment"], *counts, abs_max=tensors.get("abs_max"))


def read_group(beside: SplitFile, index: int, counts: Counts) -> InputStatistics:
    return statistics_of(beside.read(f"{index:04d}"), counts)
