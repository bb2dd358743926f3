"""Weights on disk, read tensor by tensor: nothing is mapped, so nothing stays resident."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.core.errors import ModelRefused
from app.core.sources.local_model import LocalModel
from app.core.sources.model_headers import inspect_model
from app.core.sources.safetensors_header import TensorHeader

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
COPY_BYTES = 16 * 1024**2


class Checkpoint:
    """A model's folder: its config, and one mapping from tensor name to weights.

    The files are those that submission, digest and download took for the model, by the same function.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # From which folders may be read was decided before: what is here may be.
        headers = inspect_model(LocalModel(folder, (Path("/"),)))
        self.config: dict[str, Any] = headers.config
        self.tensors: dict[str, TensorHeader] = headers.tensors
        self.side_files = headers.side_files
        self.unused: frozenset[str] = frozenset()  # tensors that the model of the config does not use

    def without(self, unused: Iterable[str]) -> Checkpoint:
        """The same checkpoint, with the tensors that the model of its config does not use."""
        other = copy(self)
        other.unused = frozenset(unused)
        return other

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.tensors if name.startswith(prefix)]

    def tensor(self, name: str, *, pinned: bool = False) -> Tensor:
        """One tensor in its own dtype; pinned memory is what a GPU copies from at full speed.

        Raises ModelRefused if it holds NaN or infinity: such weights can only give a broken model.
        """
        header = self.tensors[name]
        values = torch.empty(header.shape, dtype=DTYPES[header.dtype], pin_memory=pinned)
        if values.numel():
            read_into(self.folder / header.file, header.start, values)
        if values.is_floating_point() and not all_finite(values):
            raise self.broken(name)
        return values

    def broken(self, name: str) -> ModelRefused:
        return ModelRefused(
            f"{name} holds NaN or infinite weights",
            code="weights_not_finite", remedy="export the model again from a healthy checkpoint",
        )  # fmt: skip

    def layer_tensors(
        self, prefix: str, without: Container[str] = (), *, pinned: bool = False
    ) -> dict[str, Tensor]:
        """All tensors under `prefix`, by the rest of their names, but those of the full names `without`."""
        names = [name for name in self.names(prefix) if name not in without]
        return {name.removeprefix(prefix): self.tensor(name, pinned=pinned) for name in names}

    def raw_bytes(self, name: str) -> Iterator[bytes]:
        """A tensor's bytes in pieces, for copying it unchanged."""
        header = self.tensors[name]
        with (self.folder / header.file).open("rb") as file:
            file.seek(header.start)
            for start in range(0, header.size, COPY_BYTES):
                yield file.read(min(COPY_BYTES, header.size - start))


def all_finite(values: Tensor) -> bool:
    """NaN and infinity show in the extremes, which are found many times faster than by isfinite."""
    if values.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16) and values.numel():
        return all(bool(torch.isfinite(bound)) for bound in values.aminmax())
    return bool(torch.isfinite(values).all())


def read_into(path: Path, start: int, values: Tensor) -> None:
    """Fill a contiguous CPU tensor from a file."""
    buffer = values.view(-1).view(torch.uint8).numpy().data
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while buffer:
            count = file.readinto(buffer) or 0
            if count == 0:
                raise ModelRefused(
                    f"{path.name} ended early while a tensor was read",
                    code="model_header_invalid", remedy="the file changed under the job: submit it again",
                )  # fmt: skip
            buffer = buffer[count:]


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
