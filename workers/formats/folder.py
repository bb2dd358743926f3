"""A model folder in one format: written layer by layer, and read back the same way."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from app.core.errors import VerificationFailed
from app.core.formats.registry import FORMATS, FormatName
from app.core.planning.cached_attention import CACHE_SCALES
from app.core.planning.plan import CandidatePlan, Plan
from kernels.operators import dequantize
from kernels.weight import PackedWeight
from workers.formats.packings import ReadWeight, packing_of
from workers.formats.shards import ShardWriter, TensorPlan
from workers.modeling.cache_rounding import CacheRounder
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.input_rounding import InputRounder
from workers.modeling.layer_weights import Deferred, DeferredWeights, LookedUp, Weights
from workers.modeling.quantized_weight import QuantizedWeight
from workers.modeling.side_files import write_quantized_side_files
from workers.modeling.stored_dtypes import DTYPES
from workers.quantization.evaluation import ReadBackModel
from workers.quantization.layer import LayerResult

DISK_REMEDY = "check the disk, then retry the job; if it happens again, report it"

LoadLayer = Callable[[int], LayerResult]


class TensorWriter(Protocol):
    """Takes the tensors of a model one by one, in the order of its plan."""

    def write(self, name: str, values: Tensor) -> None: ...

    def write_bytes(self, name: str, pieces: Iterator[bytes | memoryview]) -> None: ...

    def close(self) -> None: ...


class FormatFolder:
    """One candidate in one format, in `folder`; packed where its layers lie, read back to `device`.

    Linears of the layers in `by_expert` are read back when they are looked up.
    """

    device = torch.device("cpu")
    by_expert: frozenset[int] = frozenset()

    def __init__(
        self, folder: Path, name: FormatName, source: Checkpoint, plan: Plan, candidate: CandidatePlan
    ) -> None:
        self.folder, self.name, self.plan = folder, name, plan
        self.candidate, self.format, self.packing = candidate, FORMATS[name], packing_of(name)
        self.entry = self.format.entry(candidate.modules)
        self.dtype = getattr(torch, plan.dtype)
        self.prefixes = [plan.architecture.layer_prefix(layer) for layer in range(plan.steps)]
        self.writer: TensorWriter | None = None
        self.layers_written = 0
        self.schemes = {linear.name: linear for linear in candidate.linears if linear.scheme is not None}
        self.source = source.with_whole_experts(self.schemes)

    def open(self, shard_bytes: int) -> None:
        """Start the folder anew: everything but the layers."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.write_side_files()
        layers = [[*self.names(layer), *self.scale_names(layer)] for layer in range(self.plan.steps)]
        inside = {name for names in layers for name in names}
        outside = [name for name in self.source.tensors if name not in inside]
        plans = [plan for names in (outside, *layers) for name in names for plan in self.tensor_plans(name)]
        self.writer = self.new_writer(plans, shard_bytes)
        for name in outside:
            self.copy(name)

    def new_writer(self, plans: list[TensorPlan], shard_bytes: int) -> TensorWriter:
        """What takes the tensors in the order of `plans`."""
        return ShardWriter(self.folder, plans, shard_bytes)

    def reader(self) -> Checkpoint:
        """The finished files."""
        architecture = self.plan.architecture
        return Checkpoint(self.folder).with_experts(architecture.stored_layers, architecture.kinds)

    def copy(self, name: str) -> None:
        """Append a tensor of the original as it is."""
        assert self.writer is not None
        self.writer.write_bytes(name, self.source.raw_bytes(name))

    def add_layer(self, layer: int, load_layer: LoadLayer, shard_bytes: int) -> None:
        """Append the layers up to `layer` that are not written yet, one in memory at a time."""
        if self.writer is None:
            self.open(shard_bytes)
        for number in range(self.layers_written, layer + 1):
            self.write_layer(number, load_layer(number))
            self.layers_written += 1

    def write(self, load_layer: LoadLayer, shard_bytes: int) -> None:
        """All files of the folder that are not written yet."""
        self.add_layer(self.plan.steps - 1, load_layer, shard_bytes)
        assert self.writer is not None
        self.writer.close()

    def names(self, layer: int) -> list[str]:
        """The original's tensors of a layer; of the head's step its matrix, if it is quantized."""
        if not self.plan.architecture.is_head(layer):
            scales = self.scale_names(layer)
            return [name for name in self.source.names(self.prefixes[layer]) if name not in scales]
        return [] if self.candidate.head is None else [f"{self.candidate.head}.weight"]

    def scale_names(self, layer: int) -> list[str]:
        """The tensors behind them: scales of the layer's cache, also where the original has some."""
        if self.plan.architecture.is_head(layer):
            return []
        prefix = self.prefixes[layer]
        cached = [module for module in self.candidate.cached if module.startswith(prefix)]
        return [f"{module}.{scale}" for module in cached for scale in CACHE_SCALES]

    def write_side_files(self) -> None:
        write_quantized_side_files(self.source, self.folder, self.format, self.entry)

    def linear_of(self, tensor: str) -> str | None:
        """The quantized linear whose weight `tensor` is."""
        name = tensor.removesuffix(".weight")
        return name if name != tensor and name in self.schemes else None

    def tensor_plans(self, name: str) -> list[TensorPlan]:
        """The tensors that replace a tensor of the original."""
        if name.rpartition(".")[0] in self.candidate.cached:
            return [TensorPlan(name, (1,), self.dtype)]
        linear, header = self.linear_of(name), self.source.tensors[name]
        if linear is None:
            dtype = self.format.dense_dtype(header.shape, header.dtype)
            return [TensorPlan(name, header.shape, DTYPES[dtype])]
        plan = self.schemes[linear]
        assert plan.scheme is not None
        tensors = self.format.tensors(plan.out_features, plan.in_features, plan.scheme, header.dtype)
        return [
            TensorPlan(f"{linear}.{suffix}", tensor.shape, DTYPES[tensor.dtype])
            for suffix, tensor in tensors.items()
        ]

    def write_layer(self, layer: int, result: LayerResult) -> None:
        assert self.writer is not None
        prefix = self.prefixes[layer]
        for name in self.names(layer):
            linear, local = self.linear_of(name), name.removeprefix(prefix)
            if linear is not None:
                weight = result.quantized[linear.removeprefix(prefix)]
                tensors = self.packing.pack_linear(weight, self.dtype)
                for suffix, values in tensors.items():
                    self.writer.write(f"{linear}.{suffix}", values)
            elif local in result.dense:
                dtype = DTYPES[self.source.tensors[name].dtype]
                self.writer.write(name, result.dense[local].to(dtype))
            else:
                self.copy(name)
        for name in self.scale_names(layer):
            self.writer.write(name, result.dense[name.removeprefix(prefix)].to(self.dtype))

    def read_layer(
        self, written: Checkpoint, layer: int
    ) -> tuple[Mapping[str, PackedWeight | ReadWeight], dict[str, Tensor]]:
        """The quantized linears and the other tensors of a layer, by name in the layer."""
        prefix, unused = self.prefixes[layer], self.source.unused - set(self.scale_names(layer))
        if self.plan.architecture.is_head(layer):
            if self.candidate.head is None:
                return {}, {}
            unused = frozenset(n for n in written.tensors if not n.startswith(f"{self.candidate.head}."))
        names = [
            name
            for name, plan in self.candidate.of_layer(self.plan.architecture, layer).items()
            if plan.scheme is not None
        ]
        packed = {f"{prefix}{name}.{suffix}" for name in names for suffix in self.format.suffixes}
        dense = {
            name: value.to(self.device)
            for name, value in written.layer_tensors(prefix, unused | packed).items()
        }
        linears = LookedUp(names, lambda name: self.read_linear(written, prefix + name))
        return linears if layer in self.by_expert else dict(linears), dense

    def read_linear(self, written: Checkpoint, name: str) -> PackedWeight | ReadWeight:
        """A quantized linear by its full name. Raises VerificationFailed if it can't be unpacked."""
        tensors = {
            suffix: written.tensor(f"{name}.{suffix}").to(self.device)
            for suffix in self.format.suffixes
            if f"{name}.{suffix}" in written.tensors
        }
        try:
            return self.packing.unpack_linear(tensors, self.entry, self.schemes[name].scheme)
        except ValueError as fault:
            raise VerificationFailed(f"{name}: {fault}", remedy=DISK_REMEDY) from fault

    def read_weights(self, written: Checkpoint, layer: int) -> Weights:
        """The layer as a loader would compute with it: linears dequantized."""
        quantized, dense = self.read_layer(written, layer)

        def linear(name: str) -> Tensor:
            weight = quantized[name]
            return unpacked(weight) if isinstance(weight, PackedWeight) else weight.dequantize()

        later: set[str] = set()
        if layer in self.by_expert:
            later = set(self.plan.architecture.expert_linears(layer)) & quantized.keys()
        now = {f"{name}.weight": linear(name) for name in quantized if name not in later}
        if not later:
            return {**dense, **now}
        shapes = {name: self.schemes[self.prefixes[layer] + name] for name in later}
        reads = {
            f"{name}.weight": Deferred((plan.out_features, plan.in_features), partial(linear, name))
            for name, plan in shapes.items()
        }
        return DeferredWeights({**dense, **now}, reads)

    def input_rounders(self, written: Checkpoint, layer: int) -> dict[str, InputRounder]:
        """By linear, named in the layer: how its input is rounded, where the scheme says so."""
        rounders = {}
        for name, plan in self.candidate.of_layer(self.plan.architecture, layer).items():
            inputs = None if plan.scheme is None else plan.scheme.kind.inputs
            if inputs is not None:
                full = self.prefixes[layer] + name
                scale = input_scale(written, full) if inputs.needs_range else None
                rounders[name] = InputRounder(inputs, None if scale is None else scale.to(self.device))
        return rounders

    def cache_rounder(self, written: Checkpoint, layer: int) -> CacheRounder | None:
        """What a server does to the layer's keys and values; None if they stay as they are."""
        scales = [written.tensor(name).to(self.device) for name in self.scale_names(layer)]
        if not scales or self.candidate.recipe.kv_cache is None:
            return None
        return CacheRounder.of(self.candidate.recipe.kv_cache, *scales)

    def verify(self, load_layer: LoadLayer) -> None:
        """Read the files back and compare them with what was computed.

        Raises VerificationFailed naming the first linear or tensor that differs.
        """
        written = self.reader()
        for layer in range(self.plan.steps):
            result = load_layer(layer)
            quantized, dense = self.read_layer(written, layer)
            wrong = [
                name for name, weight in quantized.items() if not same_weight(weight, result.quantized[name])
            ]
            wrong += [
                name for name, values in result.dense.items() if not torch.equal(dense[name].float(), values)
            ]
            wrong += sorted(quantized.keys() ^ result.quantized.keys())
            if wrong:
                raise VerificationFailed(
                    f"layer {layer}: {wrong[0]} read back from the {self.name} files is not as computed",
                    remedy=DISK_REMEDY,
                )

    @property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))


@dataclass(frozen=True)
class FolderModel(ReadBackModel):
    """What was written, as a loader would compute with it."""

    folder: FormatFolder
    written: Checkpoint

    @classmethod
    def of(cls, folder: FormatFolder) -> FolderModel:
        return cls(folder, folder.reader())

    def __call__(self, layer: int) -> Weights:
        return self.folder.read_weights(self.written, layer)

    def rounders(self, layer: int) -> dict[str, InputRounder]:
        return self.folder.input_rounders(self.written, layer)

    def cache_rounder(self, layer: int) -> CacheRounder | None:
        return self.folder.cache_rounder(self.written, layer)


def input_scale(written: Checkpoint, linear: str) -> Tensor:
    """(1,) float32: of a linear whose input's range is in the files."""
    names = (f"{linear}.input_global_scale", f"{linear}.input_scale")
    return next(written.tensor(name) for name in names if name in written.tensors).to(torch.float32)


def unpacked(weight: PackedWeight) -> Tensor:
    values: Tensor = dequantize(
        weight.qweight, weight.scale, weight.zero, weight.bits, weight.group_size, weight.in_features,
        torch.float32,
    )  # fmt: skip
    return values


def same_weight(read: PackedWeight | ReadWeight, computed: QuantizedWeight) -> bool:
    """Whether the files hold the weight that was computed."""
    return read.equals(computed.packed()) if isinstance(read, PackedWeight) else read.equals(computed)
