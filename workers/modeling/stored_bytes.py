"""Bytes of a file into a tensor and back, without a copy."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from app.core.errors import ModelRefused


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


class ScratchFile:
    """Tensors outside of the memory, in a file without a name: it goes with this object, whatever ends it."""

    def __init__(self, folder: Path) -> None:
        self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # closed with this object
        weakref.finalize(self, self.file.close)
        self.size = 0

    def write(self, values: Tensor, start: int | None = None) -> int:
        """Write a contiguous CPU tensor at `start`, by default at the end; where it lies."""
        buffer = values.view(-1).view(torch.uint8).numpy().data
        if start is None:
            start = self.size
            self.size += len(buffer)
        self.file.seek(start)
        while buffer:
            buffer = buffer[self.file.write(buffer) :]
        return start

    def read(self, start: int, values: Tensor) -> Tensor:
        """Fill a contiguous CPU tensor, and return it."""
        buffer = values.view(-1).view(torch.uint8).numpy().data
        self.file.seek(start)
        while buffer:
            buffer = buffer[self.file.readinto(buffer) :]
        return values
