"""Weights on disk, read tensor by tensor: nothing is mapped, so nothing stays resident.

Encoded ones (`TensorHeader.encoding`) are decoded in chunks while they are read, so they take no more memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from app.core.errors import ModelRefused
from app.core.planning.family import LayerKind
from app.core.planning.fused_experts import fused_experts
from app.core.sources.adapter_model import inspect_merged
from app.core.sources.json_file import ReadableFiles
from app.core.sources.local_model import LocalModel
from app.core.sources.model_headers import ModelHeaders, inspect_model
from app.core.sources.safetensors_header import TensorHeader
from workers.modeling.gguf_tensors import dequantized_chunks
from workers.modeling.merged_tensors import merged_chunks
from workers.modeling.quantized_tensors import quantized_chunks
from workers.modeling.stored_bytes import read_into
from workers.modeling.stored_dtypes import DTYPES

CHUNK_BYTES = 16 * 1024**2


class FusedExperts(NamedTuple):
    """A tensor of the files that holds experts, and what of it each expert's own tensors are."""

    header: TensorHeader
    parts: dict[str, TensorHeader]

    @property
    def block(self) -> str:
        """The module of all experts of the layer."""
        return next(iter(self.parts)).rsplit(".", 3)[0]


class Checkpoint:
    """A model's folder: its config, and one mapping from tensor name to weights.

    The files are those that submission, digest and download took for the model, by the same function. With
    `inspect_original` for it, quantized weights are read as plain ones; else tensors are as they are stored.
    """

    adapter_folder: Path | None = None  # of the adapter that is merged into the weights

    def __init__(
        self, folder: Path, inspect: Callable[[ReadableFiles], ModelHeaders] = inspect_model
    ) -> None:
        self.folder = folder
        # From which folders may be read was decided before: what is here may be.
        headers = inspect(LocalModel(folder, (Path("/"),)))
        self.config: dict[str, Any] = headers.config
        self.tensors: dict[str, TensorHeader] = headers.tensors
        self.side_files = headers.side_files
        self.source = headers.source
        self.gguf = None if headers.gguf is None else folder / headers.gguf
        self.unused: frozenset[str] = frozenset()  # tensors that the model of the config does not use
        self.fused: dict[str, FusedExperts] = {}  # in whose stead `tensors` has their parts

    @classmethod
    def original(cls, folder: Path, adapter: Path | None) -> Checkpoint:
        """The model that a job starts from, with the adapter merged into its weights while they are read."""
        files = None if adapter is None else LocalModel(adapter, (Path("/"),))
        checkpoint = cls(folder, partial(inspect_merged, adapter=files))
        checkpoint.adapter_folder = adapter
        return checkpoint

    def without(self, unused: Iterable[str]) -> Checkpoint:
        """The same checkpoint, with the tensors that the model of its config does not use."""
        other = copy(self)
        other.unused = frozenset(unused)
        return other

    def with_experts(self, layers: str, kinds: Iterable[LayerKind]) -> Checkpoint:
        """The same checkpoint, in which fused experts of the decoder layers `layers`.N are matrices each."""
        other = copy(self)
        fused = fused_experts(self.tensors, layers, kinds)
        other.fused = {name: FusedExperts(self.tensors[name], parts) for name, parts in fused.items()}
        other.tensors = {name: each for name, each in self.tensors.items() if name not in fused}
        for parts in fused.values():
            other.tensors |= parts
        return other

    def with_whole_experts(self, quantized: Container[str]) -> Checkpoint:
        """The same checkpoint, with experts as in the files where no linear of theirs is `quantized`.

        Such take no scales either: a group with a linear that keeps its precision has none. Encoded ones are
        apart: MXFP4 of gpt-oss lies (out, in) where its plain weights lie (in, out).
        """
        other = copy(self)
        apart = {
            each.block
            for each in self.fused.values()
            if each.header.encoding is not None
            or any(own.rpartition(".")[0] in quantized for own in each.parts)
        }
        whole = {name: each for name, each in self.fused.items() if each.block not in apart}
        parts = {name for each in whole.values() for name in each.parts}
        other.tensors = {name: each for name, each in self.tensors.items() if name not in parts}
        other.tensors |= {name: each.header for name, each in whole.items()}
        return other

    def header(self, name: str) -> TensorHeader:
        """Of a tensor of the model, or of one in the files that holds experts."""
        return self.tensors[name] if name in self.tensors else self.fused[name].header

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.tensors if name.startswith(prefix)]

    def tensor(self, name: str, *, pinned: bool = False) -> Tensor:
        """One tensor in its own dtype; pinned memory is what a GPU copies from at full speed.

        Raises ModelRefused if it holds NaN or infinity: such weights can only give a broken model.
        """
        header = self.tensors[name]
        values = torch.empty(header.shape, dtype=DTYPES[header.dtype], pin_memory=pinned)
        if values.numel() and header.encoding is None and not header.strides:
            read_into(self.folder / header.file, header.start, values)
        elif values.numel():
            filled, flat = 0, values.view(-1)
            for chunk in self.chunks(name):
                flat[filled : filled + chunk.numel()] = chunk
                filled += chunk.numel()
        if values.is_floating_point() and not all_finite(values):
            raise self.broken(name)
        return values

    def broken(self, name: str) -> ModelRefused:
        is_merged = self.tensors[name].merged is not None
        return ModelRefused(
            f"{name} holds NaN or infinite weights{' with the adapter merged into it' if is_merged else ''}",
            code="weights_not_finite", remedy="export the model again from a healthy checkpoint",
        )  # fmt: skip

    def layer_tensors(
        self, prefix: str, without: Container[str] = (), *, pinned: bool = False
    ) -> dict[str, Tensor]:
        """All tensors under `prefix`, by the rest of their names, but those of the full names `without`."""
        names = [name for name in self.names(prefix) if name not in without]
        return {name.removeprefix(prefix): self.tensor(name, pinned=pinned) for name in names}

    def chunks(self, name: str) -> Iterator[Tensor]:
        """A tensor's values in order, flat, about CHUNK_BYTES at a time; each is valid until the next.

        One that lies among others (an expert's matrix) comes at once, and what lies between is read too.
        """
        return self.values(self.header(name))

    def values(self, header: TensorHeader) -> Iterator[Tensor]:
        """The chunks of a tensor that need not be one of the model's own."""
        path, dtype = self.folder / header.file, DTYPES[header.dtype]
        if header.merged is not None:
            assert self.adapter_folder is not None
            merged = merged_chunks(header.merged, self.values(header.merged.base), self.adapter_folder)
            yield from (chunk.to(dtype) for chunk in merged)
            return
        if header.encoding is not None:
            decoded = (
                dequantized_chunks(path, header, CHUNK_BYTES)
                if header.quantized is None
                else quantized_chunks(self.folder, header, CHUNK_BYTES)
            )
            yield from (chunk.to(dtype) for chunk in decoded)
            return
        if header.strides:
            yield strided(path, header, dtype)
            return
        buffer = torch.empty(min(CHUNK_BYTES, header.size), dtype=torch.uint8)
        for start in range(header.start, header.end, CHUNK_BYTES):
            values = buffer[: min(CHUNK_BYTES, header.end - start)].view(dtype)
            read_into(path, start, values)
            yield values

    def raw_bytes(self, name: str) -> Iterator[bytes]:
        """A tensor's bytes in chunks, for copying its values unchanged."""
        for chunk in self.chunks(name):
            yield chunk.view(torch.uint8).numpy().tobytes()


def strided(path: Path, header: TensorHeader, dtype: torch.dtype) -> Tensor:
    """The values of a tensor that lies among others, in order and flat."""
    span = torch.empty((header.end - header.start) // dtype.itemsize, dtype=dtype)
    read_into(path, header.start, span)
    return span.as_strided(header.shape, header.strides).contiguous().view(-1)


def all_finite(values: Tensor) -> bool:
    """NaN and infinity show in the extremes, which are found many times faster than by isfinite."""
    if values.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16) and values.numel():
        return all(bool(torch.isfinite(bound)) for bound in values.aminmax())
    if values.itemsize == 1:  # torch tests no numbers of a byte
        values = values.to(torch.bfloat16)
    return bool(torch.isfinite(values).all())


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
