"""From an artifact's folder to a model that computes from packed weights.

The modules are transformers' own, built without memory; tensors are read one linear at a time, so the
full-precision model never exists and loading takes little more than what stays.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from app.core.errors import ModelRefused
from app.core.formats.file_format import Scheme
from app.core.formats.registry import FORMATS, FormatName
from app.core.planning.architectures import Architecture, architecture_of
from app.core.planning.cached_attention import CACHE_SCALES
from app.core.planning.family import known_family
from kernels.weight import PackedWeight
from workers.devices.selection import select_device
from workers.devices.torch_process import returned_at_once, status_bytes
from workers.discovery.family_discovery import discover
from workers.formats.packings import packing_of
from workers.modeling.cache_rounding import CacheRounder, round_cache
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.decoder import empty_model, restore_buffers
from workers.modeling.fp8_linear import Fp8Linear, why_not_fp8
from workers.modeling.input_rounding import InputRounder
from workers.modeling.quantized_linear import QuantizedLinear, quantized_linear
from workers.modeling.quantized_weight import QuantizedWeight
from workers.modeling.rounding_linear import RoundingLinear
from workers.modeling.side_files import write_side_files
from workers.modeling.soundness import parts_of, some

log = logging.getLogger(__name__)

REMEDY = "publish the artifact again; if it happens again, report it with the artifact's config.json"


@dataclass(frozen=True)
class LoadRequest:
    """The model folder to load, and how to load it."""

    folder: Path
    device: torch.device
    dtype: torch.dtype | None = None  # None: the model's own
    kernel_backend: str = "auto"
    is_original: bool = False  # a source of jobs, whose weights are read as plain ones
    adapter: Path | None = None  # merged into them

    def checkpoint(self) -> Checkpoint:
        return Checkpoint.original(self.folder, self.adapter) if self.is_original else Checkpoint(self.folder)

    @contextlib.contextmanager
    def text_folder(self) -> Iterator[Path]:
        """The folder with tokenizer, templates and settings; of an original they are as in its artifacts."""
        if not self.is_original:
            yield self.folder
            return
        with TemporaryDirectory() as folder:
            checkpoint = self.checkpoint()
            write_side_files(checkpoint, Path(folder), checkpoint.config)
            yield Path(folder)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and the time and memory that loading took."""

    model: PreTrainedModel
    config: dict[str, Any]
    dtype: torch.dtype
    kernels: dict[str, int]  # the backend and the problem it solves, to how many linears
    packed_bytes: int  # of all weights as they lie on the device
    peak_bytes: int  # that loading took


class Loader:
    """Fills one model."""

    def __init__(self, request: LoadRequest) -> None:
        self.request, self.device = request, select_device(request.device)
        self.checkpoint = request.checkpoint()
        self.config = {**self.checkpoint.config}
        self.quantization = self.config.pop("quantization_config", None) or {}
        self.format_name = format_of(self.quantization) if self.quantization else None
        self.architecture = self.known_architecture()
        stack, kinds = self.architecture.stored_layers, self.architecture.kinds
        self.checkpoint = self.checkpoint.with_experts(stack, kinds)
        self.dtype = request.dtype or model_dtype(self.config, self.device)
        self.used: set[str] = set()
        self.kernels: Counter[str] = Counter()
        self.packed_bytes = 0

    def known_architecture(self) -> Architecture:
        """The names of the model's modules; those of a type that is not known are found by tracing."""
        is_known = known_family(self.config.get("model_type", "")) is not None
        family = None if is_known else discover(self.config)
        return architecture_of(self.config, self.checkpoint.tensors, family)

    def load(self) -> LoadedModel:
        before = status_bytes("VmRSS")
        forget_peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        model = empty_model(self.config, self.architecture, self.dtype)
        restore_buffers(model, self.device)  # before weights: it initializes whole modules
        for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
            stored = self.stored_name(name)
            if self.is_packed(stored):
                model.set_submodule(name, self.packed_linear(stored, linear))
        self.fill(model)
        self.round_caches(model)
        self.refuse_leftovers(model)
        for kernel, count in self.kernels.items():
            log.info("%d linears: %s", count, kernel)
        peak = peak_bytes(self.device, before)
        return LoadedModel(model, self.config, self.dtype, dict(self.kernels), self.packed_bytes, peak)

    def stored_name(self, name: str) -> str:
        """The name in the files of a module or tensor; the head may have one of several there."""
        head = self.architecture.head
        if f"{name}.".startswith(f"{head}."):
            for module in self.architecture.head_modules:
                if any(each.startswith(f"{module}.") for each in self.checkpoint.tensors):
                    return module + name.removeprefix(head)
        return self.architecture.checkpoint_name(name)

    def is_packed(self, stored: str) -> bool:
        if self.format_name is None:
            return False
        return f"{stored}.{FORMATS[self.format_name].suffixes[0]}" in self.checkpoint.tensors

    def packed_linear(self, stored: str, linear: nn.Linear) -> QuantizedLinear | RoundingLinear | Fp8Linear:
        """A linear from its packed tensors, on the device in the layout of its kernel."""
        assert self.format_name is not None
        names = {suffix: f"{stored}.{suffix}" for suffix in FORMATS[self.format_name].suffixes}
        present = {suffix: name for suffix, name in names.items() if name in self.checkpoint.tensors}
        tensors = {suffix: self.checkpoint.tensor(name) for suffix, name in present.items()}
        scheme = FORMATS[self.format_name].scheme_in(self.quantization, stored)
        # Grids of plain integers are read off the tensors: others' files have widths that are none of ours.
        other = None if scheme is None or scheme.is_plain else scheme
        try:
            weight = packing_of(self.format_name).unpack_linear(tensors, self.quantization, other)
        except ValueError as fault:
            raise refused(stored, str(fault)) from fault
        if not isinstance(weight, PackedWeight | QuantizedWeight):
            raise refused(stored, f"files of the format {self.format_name} are not served here")
        out_features, in_features = weight.shape
        if (out_features, in_features) != (linear.out_features, linear.in_features):
            raise ModelRefused(
                f"{stored} is {out_features} x {in_features} in the files, and "
                f"{linear.out_features} x {linear.in_features} by config.json",
                code="artifact_unsupported", remedy=REMEDY,
            )  # fmt: skip
        self.used.update(present.values())
        bias = None
        if linear.bias is not None:
            bias = self.checkpoint.tensor(f"{stored}.bias")
            self.used.add(f"{stored}.bias")
        rounder = self.rounder(other, tensors)
        if isinstance(weight, QuantizedWeight):
            return self.plain(weight, rounder, bias)
        module = self.built(stored, weight, bias)
        module.rounder = rounder
        return module

    def rounder(self, scheme: Scheme | None, tensors: dict[str, torch.Tensor]) -> InputRounder | None:
        """What rounds the input of a linear with these tensors."""
        inputs = None if scheme is None else scheme.kind.inputs
        if inputs is None:
            return None
        scale = tensors.get("input_global_scale", tensors.get("input_scale"))
        return InputRounder(inputs, None if scale is None else scale.to(self.device, torch.float32))

    def plain(
        self, weight: QuantizedWeight, rounder: InputRounder | None, bias: torch.Tensor | None
    ) -> RoundingLinear | Fp8Linear:
        """A linear by PyTorch: in FP8 where it multiplies that, else in the model's dtype."""
        module: RoundingLinear | Fp8Linear
        why = why_not_fp8(weight, rounder, self.dtype, self.device)
        if why is None:
            assert rounder is not None
            module, numbers = (
                Fp8Linear(weight, rounder, dtype=self.dtype, device=self.device, bias=bias),
                "FP8",
            )
        else:
            module = RoundingLinear(weight, rounder, dtype=self.dtype, device=self.device, bias=bias)
            numbers = f"weights in {self.dtype}, as {why}"
        shape = "x".join(map(str, weight.shape))
        self.kernels[f"{shape}, {weight.scheme.name}: torch, {numbers}"] += 1
        self.packed_bytes += module.packed_bytes
        return module

    def built(self, stored: str, weight: PackedWeight, bias: torch.Tensor | None) -> QuantizedLinear:
        try:
            module = quantized_linear(
                weight, dtype=self.dtype, device=self.device, bias=bias, requested=self.request.kernel_backend
            )
        except ValueError as fault:
            raise ModelRefused(
                f"{stored}: {fault}", code="kernel_unsupported", remedy="set the kernel backend to auto"
            ) from fault
        self.kernels[described(weight, module)] += 1
        self.packed_bytes += module.packed_bytes
        return module

    def fill(self, model: PreTrainedModel) -> None:
        """Every parameter that is left, in the dtype that its module wants."""
        head = self.architecture.head + ".weight"
        embedding = self.architecture.embedding + ".weight"
        for name, empty in list(model.state_dict().items()):
            if empty.device.type != "meta" or not self.architecture.of_language(name):
                continue
            stored = self.stored_name(name)
            if stored not in self.checkpoint.tensors and name == head and self.architecture.tied:
                continue  # tied: shared with the embedding below
            parts = self.architecture.parts_of(name) or (stored,)
            missing = next((each for each in parts if each not in self.checkpoint.tensors), None)
            if missing is not None:
                raise ModelRefused(
                    f"the artifact lacks the tensor {missing}", code="artifact_incomplete", remedy=REMEDY
                )
            self.used.update(parts)
            read = [self.checkpoint.tensor(each) for each in parts]
            # A number by itself, as some activations have, can't be concatenated.
            values = (read[0] if len(read) == 1 else torch.cat(read)).to(self.device, empty.dtype)
            if values.shape != empty.shape:
                raise ModelRefused(
                    f"{stored} is {tuple(values.shape)} in the files, {tuple(empty.shape)} by config.json",
                    code="artifact_unsupported", remedy=REMEDY,
                )  # fmt: skip
            model.load_state_dict({name: values}, strict=False, assign=True)
            self.packed_bytes += values.numel() * values.element_size()
        state = model.state_dict()
        if head in state and state[head].device.type == "meta":
            model.load_state_dict({head: state[embedding]}, strict=False, assign=True)
        model.requires_grad_(requires_grad=False)

    def round_caches(self, model: PreTrainedModel) -> None:
        """Let attentions hand rounded keys and values to their caches, where the files have scales for it.

        Raises ModelRefused for scales that are not one for all keys and one for all values of a layer.
        """
        numbers = None if self.format_name is None else FORMATS[self.format_name].cache_in(self.quantization)
        if numbers is None:
            return
        for name, module in model.named_modules():
            names = [self.stored_name(f"{name}.{scale}") for scale in CACHE_SCALES]
            if all(each in self.checkpoint.tensors for each in names):
                scales = [self.checkpoint.tensor(each).to(self.device) for each in names]
                if any(scale.numel() != 1 for scale in scales):
                    raise refused(
                        name, f"scales of its cache are of shape {tuple(scales[0].shape)}, not (1,)"
                    )
                round_cache(module, CacheRounder.of(numbers, *scales))
                self.used.update(names)

    def refuse_leftovers(self, model: PreTrainedModel) -> None:
        """Tensors that the model does not use are logged: old buffers, other heads, layers for speculation.

        Raises ModelRefused for one of a linear: without it, the linear would compute something else.
        """
        left = [name for name in self.checkpoint.tensors if name not in self.used]
        linears = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | QuantizedLinear) and self.architecture.of_language(name)
        ]
        modules = {self.architecture.checkpoint_name(name + ".")[:-1] for name in linears}
        tensor = next(parts_of(left, modules), None)
        if tensor is not None:
            raise ModelRefused(
                f"no module of {self.architecture.class_name} takes the tensor {tensor}",
                code="artifact_unsupported", remedy=REMEDY,
            )  # fmt: skip
        if left:
            owner = f"the language model of {self.architecture.class_name}"
            log.warning("not loaded, as no part of %s: %s", owner, some(left))


def load_model(request: LoadRequest) -> LoadedModel:
    """The artifact of a folder on a device.

    Raises ModelRefused for files that can't be served, naming what is wrong with them.
    """
    with returned_at_once():
        return Loader(request).load()


def format_of(entry: dict[str, Any]) -> FormatName:
    """The format of files with this entry of config.json. Raises ModelRefused for what can't be read."""
    method, what = entry.get("quant_method"), "the artifact"
    name = next((name for name in FORMATS if name == method), None)
    if name is None:
        raise refused(what, f"quant_method {method!r} is not one of {', '.join(sorted(FORMATS))}")
    why = FORMATS[name].unreadable(entry)
    if why is not None:
        raise refused(what, why)
    return name


def refused(what: str, why: str) -> ModelRefused:
    return ModelRefused(
        f"{what}: {why}",
        code="artifact_unsupported",
        remedy=f"quantize the model again in one of the formats {', '.join(FORMATS)}",
    )


def model_dtype(config: dict[str, Any], device: torch.device) -> torch.dtype:
    """The dtype that config.json names. float16 is slow on CPUs and overflows, so there it is float32."""
    named = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(named), None)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ModelRefused(
            f"config.json: dtype {named!r}", code="config_invalid", remedy="use float16, bfloat16 or float32"
        )
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype


def described(weight: PackedWeight, module: QuantizedLinear) -> str:
    grid = "asymmetric" if weight.zero is not None else "symmetric"
    group = "rows" if weight.group_size == -1 else f"groups of {weight.group_size}"
    shape = f"{weight.out_features}x{weight.in_features}"
    return f"{shape}, {weight.bits} bits, {group}, {grid}: {module.selection}"


def forget_peak() -> None:
    """Reset the peak, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device, before: int) -> int:
    """The most that loading took: of the device's memory, or of the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return status_bytes("VmHWM") - before
