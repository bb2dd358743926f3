"""Bytes of a file into a tensor, without a copy."""

from __future__ import annotations

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
