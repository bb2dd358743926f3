"""A model folder written tensor by tensor, in the order of the original's files and in any order within one.

Where each tensor lies is known before, so slices are written at their places by several threads. A file that
is complete gets its name; what was written is compared with what the disk gives back.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from app.core.errors import VerificationFailed
from app.core.formats.registry import FORMATS, FormatName
from app.core.planning.plan import CandidatePlan, LinearPlan
from kernels.cpu.checksum import checksum
from workers.formats.packings import packing_of
from workers.formats.shards import TensorPlan, beginning_of, shard_name, split_shards, write_index
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.quantized_weight import QuantizedWeight
from workers.modeling.side_files import write_quantized_side_files
from workers.modeling.stored_dtypes import DTYPES
from workers.quantization.row_rounding import BLOCK_ROWS

DISK_REMEDY = "check the disk, then retry the job; if it happens again, report it"
SHAPE = "weight_shape"  # of a format's tensors the one whose values are the whole matrix's


@dataclass(frozen=True)
class Conversion:
    """A tensor of the original, and the tensors that replace it: of a linear if it is quantized."""

    name: str
    linear: LinearPlan | None
    plans: tuple[TensorPlan, ...]

    @property
    def size(self) -> int:
        return sum(plan.size for plan in self.plans)


class Stretch(NamedTuple):
    """Bytes that were written."""

    start: int
    size: int
    checksum: int


class StreamedFile:
    """One file of the output, written at any places until it is finished."""

    def __init__(self, path: Path, conversions: list[Conversion]) -> None:
        self.path, self.conversions = path, conversions
        plans = [plan for conversion in conversions for plan in conversion.plans]
        self.beginning = beginning_of(plans)
        self.starts: dict[str, int] = {}
        self.size = len(self.beginning)
        for plan in plans:
            self.starts[plan.name] = self.size
            self.size += plan.size
        self.stretches: list[Stretch] = []  # appended by several threads, each at once
        self.descriptor = -1
        self.writing = Lock()  # the system lets one thread write to a file, and has others wait at full speed

    @property
    def aside(self) -> Path:
        return self.path.with_suffix(".partial")

    def is_whole(self, path: Path) -> bool:
        """Whether the file at `path` is this one, by its header and size."""
        if not path.exists() or path.stat().st_size != self.size:
            return False
        with path.open("rb") as file:
            return file.read(len(self.beginning)) == self.beginning

    def open(self) -> None:
        self.descriptor = os.open(self.aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self.put(0, torch.frombuffer(bytearray(self.beginning), dtype=torch.uint8))

    def write(self, tensor: str, offset: int, values: Tensor) -> None:
        """Put values at `offset` bytes into their tensor."""
        self.put(self.starts[tensor] + offset, values.contiguous().view(-1).view(torch.uint8))

    def put(self, start: int, values: Tensor) -> None:
        self.stretches.append(Stretch(start, values.numel(), checksum(values)))
        content = values.numpy().data
        with self.writing:
            while content:
                count = os.pwrite(self.descriptor, content, start)
                content, start = content[count:], start + count

    def check(self, stretch: Stretch) -> None:
        """Raises VerificationFailed unless the file holds the bytes that were written."""
        content = torch.empty(stretch.size, dtype=torch.uint8)
        count = os.preadv(self.descriptor, [content.numpy().data], stretch.start)
        if count != stretch.size or checksum(content) != stretch.checksum:
            raise VerificationFailed(
                f"{self.path.name}: the {stretch.size} bytes from {stretch.start} on, read back, are not as "
                "computed",
                remedy=DISK_REMEDY,
            )

    def close(self) -> None:
        """Whatever happened: leave nothing open."""
        if self.descriptor != -1:
            os.close(self.descriptor)
            self.descriptor = -1

    def finish(self) -> None:
        """Give the file its name. Raises VerificationFailed if a byte of it was never written."""
        written = sum(stretch.size for stretch in self.stretches)
        if written != self.size:
            raise VerificationFailed(
                f"{self.path.name}: {written} of {self.size} bytes were written", remedy=DISK_REMEDY
            )
        self.close()
        os.replace(self.aside, self.path)


class StreamedFolder:
    """One candidate in one format."""

    def __init__(
        self, folder: Path, name: FormatName, source: Checkpoint, candidate: CandidatePlan, shard_bytes: int
    ) -> None:
        self.folder, self.name, self.candidate = folder, name, candidate
        self.format, self.packing = FORMATS[name], packing_of(name)
        self.linears = {linear.name: linear for linear in candidate.linears if linear.scheme is not None}
        self.source = source.with_whole_experts(self.linears)
        shards = split_shards(map(self.conversion, self.source.tensors), shard_bytes)
        self.files = [
            StreamedFile(folder / shard_name(number, len(shards)), shard)
            for number, shard in enumerate(shards)
        ]

    def open(self) -> None:
        """Make the folder, with everything but the weights."""
        self.folder.mkdir(parents=True, exist_ok=True)
        entry = self.format.entry(self.candidate.modules)
        write_quantized_side_files(self.source, self.folder, self.format, entry)
        plans = [[plan for each in file.conversions for plan in each.plans] for file in self.files]
        write_index(self.folder, plans)

    def conversion(self, name: str) -> Conversion:
        header = self.source.tensors[name]
        linear = self.linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if linear is None:
            return Conversion(name, None, (TensorPlan(name, header.shape, DTYPES[header.dtype]),))
        plans = self.stored(linear, linear.out_features).values()
        return Conversion(name, linear, tuple(plans))

    def stored(self, linear: LinearPlan, rows: int) -> dict[str, TensorPlan]:
        """The tensors by suffix of the linear's first `rows`."""
        assert linear.scheme is not None
        dtype = self.source.tensors[f"{linear.name}.weight"].dtype
        tensors = self.format.tensors(rows, linear.in_features, linear.scheme, dtype)
        return {
            suffix: TensorPlan(f"{linear.name}.{suffix}", tensor.shape, DTYPES[tensor.dtype])
            for suffix, tensor in tensors.items()
        }

    def in_float16(self, dtype: torch.dtype) -> bool:
        """Whether a linear of `dtype` may be run in float16."""
        return dtype == torch.float16 or self.format.scale_dtype == "F16"

    @property
    def by_rows(self) -> bool:
        """Whether the tensors of a matrix's first rows come first in those of the matrix."""
        return self.name == "compressed-tensors"

    def write_rows(self, file: StreamedFile, linear: LinearPlan, start: int, weight: QuantizedWeight) -> None:
        """Put rows of a linear, from `start` on, at their places; the whole matrix from 0 on."""
        dtype = DTYPES[self.source.tensors[f"{linear.name}.weight"].dtype]
        before = self.stored(linear, start) if start else {}
        for suffix, values in self.packing.pack_linear(weight, dtype).items():
            if suffix in self.of_the_matrix(linear):
                if start == 0:
                    shape = torch.tensor((linear.out_features, linear.in_features))
                    file.write(f"{linear.name}.{suffix}", 0, shape if suffix == SHAPE else values)
            else:
                file.write(f"{linear.name}.{suffix}", before[suffix].size if start else 0, values)

    def of_the_matrix(self, linear: LinearPlan) -> set[str]:
        """The suffixes of tensors that do not grow with rows."""
        one, two = (self.stored(linear, count * BLOCK_ROWS) for count in (1, 2))
        return {suffix for suffix in one if one[suffix].shape == two[suffix].shape}

    @property
    def weight_bytes(self) -> int:
        return sum(file.size for file in self.files)
