"""safetensors files written tensor by tensor: the layout is known before, so nothing is collected.

Format: https://github.com/huggingface/safetensors, section Format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, TypeVar

import torch
from torch import Tensor

from workers.modeling.checkpoint import num_bytes
from workers.modeling.stored_dtypes import DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return num_bytes(self.shape, self.dtype)


class ShardWriter:
    """Writes the tensors of `plans`, in that order, to files of at most `shard_bytes` each.

    A tensor larger than `shard_bytes` gets a file of its own.
    """

    def __init__(self, folder: Path, plans: list[TensorPlan], shard_bytes: int) -> None:
        self.folder, self.plans = folder, plans
        self.shards = split_shards(plans, shard_bytes)
        self.file: IO[bytes] | None = None
        self.position = 0
        self.starts: dict[int, int] = {}  # position of a shard's first tensor -> shard
        total = 0
        for number, shard in enumerate(self.shards):
            self.starts[total] = number
            total += len(shard)

    def shard_name(self, number: int) -> str:
        return shard_name(number, len(self.shards))

    def write(self, name: str, values: Tensor) -> None:
        """Append the next tensor of the plan."""
        plan = self.plans[self.position]
        assert (plan.name, plan.shape, plan.dtype) == (name, tuple(values.shape), values.dtype), plan
        flat = values.detach().cpu().contiguous().view(-1).view(torch.uint8)
        self.write_bytes(name, iter([flat.numpy().data]))

    def write_bytes(self, name: str, pieces: Iterator[bytes | memoryview]) -> None:
        """Append the next tensor of the plan from its bytes."""
        plan = self.plans[self.position]
        assert plan.name == name, (plan.name, name)
        if self.position in self.starts:
            self.open_shard(self.starts[self.position])
        assert self.file is not None
        written = sum(self.file.write(chunk) for chunk in pieces)
        assert written == plan.size, (name, written, plan.size)
        self.position += 1

    def open_shard(self, number: int) -> None:
        if self.file is not None:
            self.file.close()
        self.file = (self.folder / self.shard_name(number)).open("wb")
        self.file.write(beginning_of(self.shards[number]))

    def close(self) -> None:
        """Finish the last file and write the index if there are several."""
        assert self.position == len(self.plans), f"{len(self.plans) - self.position} tensors are missing"
        if self.file is not None:
            self.file.close()
        write_index(self.folder, self.shards)


def shard_name(number: int, count: int) -> str:
    """Of one of `count` files."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def beginning_of(plans: list[TensorPlan]) -> bytes:
    """What precedes the tensors in a file: the length of the header, and the header."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        end = offset + plan.size
        entries[plan.name] = {
            "dtype": DTYPE_NAMES[plan.dtype], "shape": list(plan.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def write_index(folder: Path, shards: list[list[TensorPlan]]) -> None:
    """Write the index if there are several files."""
    if len(shards) > 1:
        files = {
            plan.name: shard_name(number, len(shards))
            for number, shard in enumerate(shards)
            for plan in shard
        }
        total = sum(plan.size for shard in shards for plan in shard)
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


class Sized(Protocol):
    """What takes space in a file."""

    @property
    def size(self) -> int: ...


SizedT = TypeVar("SizedT", bound=Sized)


def split_shards(plans: Iterable[SizedT], shard_bytes: int) -> list[list[SizedT]]:
    """In order, as many in each as fit `shard_bytes`, and at least one."""
    shards: list[list[SizedT]] = []
    used = 0
    for plan in plans:
        if not shards or used + plan.size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(plan)
        used += plan.size
    return shards
